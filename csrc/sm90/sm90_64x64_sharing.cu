#include "sm90/matmul.cuh"

MIXDQ_SM90_INSTANCE(sm90_64x64_sharing, 64, 64, sharing, false)

#include "sm90/matmul.cuh"

MIXDQ_SM90_INSTANCE(sm90_64x160_sharing, 64, 160, sharing, false)

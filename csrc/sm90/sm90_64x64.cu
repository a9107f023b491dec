#include "sm90/matmul.cuh"

MIXDQ_SM90_INSTANCE(sm90_64x64, 64, 64, single, false)

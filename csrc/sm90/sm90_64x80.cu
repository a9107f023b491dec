#include "sm90/matmul.cuh"

MIXDQ_SM90_INSTANCE(sm90_64x80, 64, 80, single, false)

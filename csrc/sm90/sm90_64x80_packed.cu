#include "sm90/matmul.cuh"

MIXDQ_SM90_INSTANCE(sm90_64x80_packed, 64, 80, single, true)

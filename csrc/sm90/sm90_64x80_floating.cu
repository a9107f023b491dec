#include "sm90/matmul.cuh"

MIXDQ_SM90_FLOATING_INSTANCE(sm90_64x80_floating, 64, 80, single)

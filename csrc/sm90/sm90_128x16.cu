#include "sm90/matmul.cuh"

MIXDQ_SM90_INSTANCE(sm90_128x16, 128, 16, single, false)

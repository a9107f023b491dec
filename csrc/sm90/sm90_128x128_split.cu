#include "sm90/matmul.cuh"

MIXDQ_SM90_INSTANCE(sm90_128x128_split, 128, 128, single, false)

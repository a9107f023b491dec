#include "sm90/matmul.cuh"

MIXDQ_SM90_INSTANCE(sm90_128x160_split, 128, 160, single, false)

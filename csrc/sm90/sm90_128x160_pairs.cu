#include "sm90/matmul.cuh"

MIXDQ_SM90_INSTANCE(sm90_128x160_pairs, 128, 160, pairs, false)

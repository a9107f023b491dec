#include "sm90/matmul.cuh"

MIXDQ_SM90_INSTANCE(sm90_64x160_pairs, 64, 160, pairs, false)

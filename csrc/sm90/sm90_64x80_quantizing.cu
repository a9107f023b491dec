#include "sm90/matmul.cuh"

MIXDQ_SM90_QUANTIZING_INSTANCE(sm90_64x80_quantizing, 64, 80, single)

#include "sm90/matmul.cuh"

MIXDQ_SM90_INSTANCE(sm90_128x64, 128, 64, single, false)

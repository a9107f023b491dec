#include "sm90/matmul.cuh"

MIXDQ_SM90_INSTANCE(sm90_256x128, 256, 128, cooperative, false)

#include "sm90/matmul.cuh"

MIXDQ_SM90_INSTANCE(sm90_64x160_packed, 64, 160, ping_pong, true)

#include "sm90/matmul.cuh"

MIXDQ_SM90_GEGLU_INSTANCE(sm90_64x160_packed_geglu, 64, 160, ping_pong, true)

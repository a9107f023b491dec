#include "sm90/matmul.cuh"

MIXDQ_SM90_GEGLU_INSTANCE(sm90_128x160_packed_geglu, 128, 160, ping_pong, true)

#include "sm90/matmul.cuh"

MIXDQ_SM90_GEGLU_INSTANCE(sm90_128x128_geglu, 128, 128, ping_pong, false)

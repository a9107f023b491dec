#include "sm90/matmul.cuh"

MIXDQ_SM90_FLOATING_INSTANCE(sm90_128x128_floating, 128, 128, ping_pong)

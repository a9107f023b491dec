#include "sm90/matmul.cuh"

MIXDQ_SM90_INSTANCE(sm90_128x160, 128, 160, ping_pong, false)

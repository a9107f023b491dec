#include "sm90/matmul.cuh"

MIXDQ_SM90_INSTANCE(sm90_128x128, 128, 128, ping_pong, false)

// The last error of the calling thread, as text; and the checks of a batch that every entry shares.
#pragma once
#include <stdint.h>

#include "octavo_cpu.h"

// Records the message and returns false.
bool fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
// Whether every position, slot and block table entry is in range (else records which is not).
bool check_batch(const oct_batch& batch, int64_t max_positions);

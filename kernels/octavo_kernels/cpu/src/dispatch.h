// The table of kernels in use.
#pragma once
#include "kernels.h"

const KernelTable& kernels();

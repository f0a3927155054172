#include "device.h"
#include "spaces.h"
#include "amdgcn.h"
#include "threads.h"

// What the two halves of the stand-in share.
#pragma once
#include <driver_types.h>

typedef cudaError_t rt;
#define OK cudaSuccess

void say(const char *format, ...);                             // write a line of the record
void launched(const char *by, const char *name, void *stream); // record a launch

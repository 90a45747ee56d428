/* The stream that every emulated launch has to be given: another, the default one too, is refused. For C as well. */
#ifndef LF_EMULATION_STREAM_H
#define LF_EMULATION_STREAM_H

#include <stdint.h>

#define LF_EMULATED_STREAM ((void*)(uintptr_t)0x57ea40)

#endif /* LF_EMULATION_STREAM_H */

// Loops whose counts are known and whose bodies must become straight code, and those that must not.
#pragma once

#if defined(BDK_NO_UNROLL)
#define BDK_UNROLL
#define BDK_NO_UNROLL_LOOP
#elif defined(__clang__)
#define BDK_UNROLL _Pragma("unroll")
#define BDK_NO_UNROLL_LOOP _Pragma("nounroll")
#else
#define BDK_UNROLL _Pragma("GCC unroll 64")
#define BDK_NO_UNROLL_LOOP _Pragma("GCC unroll 1")
#endif

// Makes the compiler store all that is written to where `at` points: for instructions that it does not see reading it.
#define BDK_STORED(at) __asm__ volatile("" : : "r"(at) : "memory")

// Makes the compiler believe that a register's value has changed.
#if defined(__aarch64__)
#define BDK_KEEP(value) __asm__ volatile("" : "+w"(value))
#else
#define BDK_KEEP(value) __asm__ volatile("" : "+x"(value))
#endif

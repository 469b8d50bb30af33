/* What this processor can do, as far as the operators use it. */
#pragma once

typedef enum {
  ISA_NONE, /* not even AVX2, FMA and F16C */
  ISA_AVX2,
  ISA_AVX512_VNNI,
  ISA_AMX_INT8, /* AVX-512 with VNNI included */
} processor_isa;

/* The best of them; no better than the variable HEADRACE_KERNELS_MAX_ISA names, if it is set when this is first called. */
processor_isa processor_best(void);

/* As that variable has it; NULL for ISA_NONE. */
const char *processor_name(processor_isa isa);

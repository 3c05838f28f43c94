"""llama.cpp's quantiser. usage: quantise_llama_cpp.py SOURCE TARGET TYPE_NUMBER EVERY_MATRIX(0|1)"""

import ctypes
import os
import sys

import llama_cpp as lib

source, target, number, is_pure = sys.argv[1], sys.argv[2], int(sys.argv[3]), bool(int(sys.argv[4]))
params = lib.llama_model_quantize_default_params()
params.ftype, params.pure, params.nthread = number, is_pure, os.cpu_count()
sys.exit(lib.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))

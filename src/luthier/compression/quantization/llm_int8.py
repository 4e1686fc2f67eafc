"""LLM.int8(): eight bits everywhere, but for the few inputs that are too large for them.

Paper: Dettmers, Lewis, Belkada and Zettlemoyer, 2022, "LLM.int8(): 8-bit Matrix Multiplication for
    Transformers at Scale", arXiv 2208.07339.
Pick it when a model is to take half the memory without any data and without loss.
Cost: a byte a weight and four a row; no data, no training. Each call looks through its inputs once more.

With inputs X (T, K) of all tokens of a call and the weight W (N, K) of a layer:

    O     = { k : |X_tk| >= threshold for some t }                the outlying features
    y_tn  = s_t s_n sum_{k not in O} Xq_tk Wq_nk + sum_{k in O} X_tk W'_nk
    Wq_nk = round(W_nk / s_n),   s_n = max_k |W_nk| / 127,        W'_nk = s_n Wq_nk
    Xq_tk = round(X_tk / s_t),   s_t = max |X_tk| / 127 over the entries below the threshold

Without outliers this is one scale a row and a token. A token with an outlier moves its feature out of the
eight bits for all tokens of the call: what a token gives depends a little on its neighbours, and on whether
it is generated with a cache. Models below some billions of parameters have few inputs of size 6: a threshold
of 3 to 5 may serve them better.

The paper multiplies outlying features by the weight in 16 bits. That weight would have to be kept whole, for
any feature may be the next outlier: here, as in the authors' bitsandbytes, it is the one of the codes, W'.
`luthier.compression.outliers.to_bitsandbytes` hands the layers to its kernels and its format.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from luthier.compression.block import Block
from luthier.compression.linear import matrix, quantize_layer
from luthier.compression.method import OneShot, weight_error
from luthier.compression.outliers import SCHEME, OutlierLinear, row_grid
from luthier.compression.records import Record
from luthier.options import option


@dataclass
class Config(OneShot):
    threshold: float = option(6.0, "size of an input from which on its feature is an outlier; 0: none", ge=0)

    quantizes: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False

    def change(self, block: Block) -> Iterator[Record]:
        for name, layer in block.layers().items():
            start = time.perf_counter()
            weight = matrix(layer)
            grid = row_grid(weight)
            codes = grid.quantize(weight)
            error = weight_error(grid.dequantize(codes) - weight, weight)
            made = quantize_layer(layer, codes, grid, kind=OutlierLinear, threshold=self.threshold)
            block.replace(name, made)
            seconds = time.perf_counter() - start
            yield Record(name, error, error, bits=SCHEME.bits, seconds=seconds, note="error of the weight")

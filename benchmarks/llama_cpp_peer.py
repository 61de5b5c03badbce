"""llama.cpp's side of `benchmarks/llama_cpp.py`; it runs in an environment of its own (`make llama-cpp`).

Reads a request a line and answers with a line, both JSON: {"make": FOLDER, "sizes": ...} makes a Llama with random weights in Q4_0 by llama.cpp's own
program, {"model": PATH} opens it, {"prompt": [...], "tokens": n} reads and decodes greedily; {"layer": [inputs, outputs]}
makes a Q4_0 matrix, {"rows": n, "repeats": m} multiplies it. Seconds, wall time.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

Q4_0, F32 = 2, 0
"""Types of ggml."""
LIBRARIES = Path(llama_cpp.__file__).parent / "lib"
POINTER = ctypes.c_void_p


def make(folder: str, sizes: dict[str, int], _threads: int) -> dict[str, Any]:
    """Write random weights in 16 bits, and quantize them as `llama-quantize` does (the head gets 6 bits)."""
    dense, small = Path(folder) / "dense.gguf", Path(folder) / "q4_0.gguf"
    hidden, width, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    head = hidden // sizes["num_attention_heads"]
    writer = gguf.GGUFWriter(dense, "llama")
    writer.add_context_length(1024)
    writer.add_embedding_length(hidden)
    writer.add_block_count(sizes["num_hidden_layers"])
    writer.add_feed_forward_length(width)
    writer.add_head_count(sizes["num_attention_heads"])
    writer.add_head_count_kv(sizes["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(vocabulary)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")
    drawn = np.random.default_rng(0)

    def add(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(f"{name}.weight", (0.02 * drawn.standard_normal((rows, columns), np.float32)).astype("f2"))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(hidden, np.float32))

    add("token_embd", vocabulary, hidden)
    shared = head * sizes["num_key_value_heads"]
    for block in range(sizes["num_hidden_layers"]):
        norm(f"blk.{block}.attn_norm")
        for name, rows in (("attn_q", hidden), ("attn_k", shared), ("attn_v", shared), ("attn_output", hidden)):
            add(f"blk.{block}.{name}", rows, hidden)
        norm(f"blk.{block}.ffn_norm")
        for name, rows, columns in (
            ("ffn_gate", width, hidden),
            ("ffn_up", width, hidden),
            ("ffn_down", hidden, width),
        ):
            add(f"blk.{block}.{name}", rows, columns)
    norm("output_norm")
    add("output", vocabulary, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    if llama_cpp.llama_model_quantize(os.fsencode(dense), os.fsencode(small), ctypes.byref(parameters)):
        raise SystemExit("llama.cpp could not quantize its model")
    dense.unlink()
    return {"path": str(small), "bytes": small.stat().st_size}


class Model:
    """A model that llama.cpp opened, for texts of at most `places` tokens."""

    def __init__(self, path: str, places: int, threads: int):
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(path), llama_cpp.llama_model_default_params())
        asked = llama_cpp.llama_context_default_params()
        asked.n_ctx, asked.n_batch, asked.n_ubatch = places, 512, 512
        asked.n_threads = asked.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, asked)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def run(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        began = time.perf_counter()
        token = self._read(prompt)
        read = time.perf_counter()
        for _ in range(tokens):
            token = self._read([token])
        return {"prefill": read - began, "decode": time.perf_counter() - read}

    def _read(self, tokens: list[int]) -> int:
        """The likeliest token after those."""
        kept = (llama_cpp.llama_token * len(tokens))(*tokens)  # the batch points to it
        batch = llama_cpp.llama_batch_get_one(kept, len(tokens))
        if llama_cpp.llama_decode(self.context, batch):
            raise SystemExit("llama.cpp could not decode")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())


class Parameters(ctypes.Structure):
    """`ggml_init_params`."""

    _fields_ = (("size", ctypes.c_size_t), ("buffer", POINTER), ("no_alloc", ctypes.c_bool))


def functions() -> Any:
    """Ggml's functions that a product of matrices takes, by name."""
    base, cpu, top = (ctypes.CDLL(str(LIBRARIES / f"lib{n}.so")) for n in ("ggml-base", "ggml-cpu", "ggml"))
    whole, size = ctypes.c_int64, ctypes.c_size_t
    known: dict[str, tuple[Any, Any, list[Any]]] = {
        "ggml_init": (base, POINTER, [Parameters]),
        "ggml_new_tensor_2d": (base, POINTER, [POINTER, ctypes.c_int, whole, whole]),
        "ggml_mul_mat": (base, POINTER, [POINTER] * 3),
        "ggml_new_graph": (base, POINTER, [POINTER]),
        "ggml_build_forward_expand": (base, None, [POINTER] * 2),
        "ggml_nbytes": (base, size, [POINTER]),
        "ggml_free": (base, None, [POINTER]),
        "ggml_quantize_chunk": (base, size, [ctypes.c_int, POINTER, POINTER, whole, whole, whole, POINTER]),
        "ggml_backend_alloc_ctx_tensors_from_buft": (base, POINTER, [POINTER] * 2),
        "ggml_backend_buffer_free": (base, None, [POINTER]),
        "ggml_backend_buft_name": (base, ctypes.c_char_p, [POINTER]),
        "ggml_backend_tensor_set": (base, None, [POINTER, POINTER, size, size]),
        "ggml_backend_tensor_get": (base, None, [POINTER, POINTER, size, size]),
        "ggml_backend_graph_compute": (base, ctypes.c_int, [POINTER] * 2),
        "ggml_backend_reg_get_proc_address": (base, POINTER, [POINTER, ctypes.c_char_p]),
        "ggml_backend_reg_dev_get": (base, POINTER, [POINTER, size]),
        "ggml_backend_cpu_buffer_type": (base, POINTER, []),
        "ggml_backend_cpu_reg": (cpu, POINTER, []),
        "ggml_backend_cpu_init": (cpu, POINTER, []),
        "ggml_backend_cpu_set_n_threads": (cpu, None, [POINTER, ctypes.c_int]),
    }
    found = type("functions", (), {"top": top})
    for name, (library, answer, takes) in known.items():
        function = getattr(library, name)
        function.restype, function.argtypes = answer, takes
        setattr(found, name.removeprefix("ggml_").removeprefix("backend_"), staticmethod(function))
    return found


class Layer:
    """Q4_0 matrices of random numbers, enough of them that no cache holds them, in the layout that llama.cpp would choose."""

    def __init__(self, inputs: int, outputs: int, threads: int):
        self.ggml, self.inputs, self.outputs = functions(), inputs, outputs
        self.backend = self.ggml.cpu_init()
        self.ggml.cpu_set_n_threads(self.backend, threads)
        self.kind, self.name = self._buffer_type()
        self.first = 0
        self.copies = max(2, round(256e6 / (inputs * outputs * 0.5625)))
        dense = 0.02 * np.random.default_rng(0).standard_normal((outputs, inputs), np.float32)
        self.dense = dense
        self.context = self.ggml.init(Parameters(1 << 20, None, True))
        self.weights = [self.ggml.new_tensor_2d(self.context, Q4_0, inputs, outputs) for _ in range(self.copies)]
        self.ggml.alloc_ctx_tensors_from_buft(self.context, self.kind)
        size = self.ggml.nbytes(self.weights[0])
        packed = ctypes.create_string_buffer(size)
        self.ggml.quantize_chunk(Q4_0, dense.ctypes.data, packed, 0, outputs, inputs, None)
        for weight in self.weights:
            self.ggml.tensor_set(weight, packed, 0, size)

    def _buffer_type(self) -> tuple[int, str]:
        """The layout that llama.cpp takes for such weights: its repacked one where there is one."""
        registry = self.ggml.cpu_reg()
        address = self.ggml.reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        kinds = ctypes.CFUNCTYPE(ctypes.POINTER(POINTER), POINTER)(address)(self.ggml.reg_dev_get(registry, 0))
        found = [self.ggml.cpu_buffer_type()]
        for index in range(8):
            if not kinds[index]:
                break
            found.insert(0, kinds[index])
        names = [self.ggml.buft_name(kind).decode() for kind in found]
        chosen = next((i for i, name in enumerate(names) if "REPACK" in name), len(found) - 1)
        return found[chosen], names[chosen]

    def run(self, rows: int, repeats: int) -> dict[str, Any]:
        """Seconds of each product, and its distance from the dense one."""
        context = self.ggml.init(Parameters(1 << 24, None, True))
        x = self.ggml.new_tensor_2d(context, F32, self.inputs, rows)
        graphs, products = [], {}
        for weight in self.weights:
            product = self.ggml.mul_mat(context, weight, x)
            graph = self.ggml.new_graph(context)
            self.ggml.build_forward_expand(graph, product)
            products[graph] = product
            graphs.append(graph)
        buffer = self.ggml.alloc_ctx_tensors_from_buft(context, self.ggml.cpu_buffer_type())
        given = np.random.default_rng(1).standard_normal((rows, self.inputs), np.float32)
        self.ggml.tensor_set(x, given.ctypes.data, 0, given.nbytes)
        seconds = []
        for repeat in range(repeats + 2):
            graph = graphs[(repeat + self.first) % len(graphs)]
            began = time.perf_counter()
            if self.ggml.graph_compute(self.backend, graph):
                raise SystemExit("ggml could not multiply")
            seconds.append(time.perf_counter() - began)
        self.first += max(1, len(graphs) // 2)  # a turn does not find what the last one read
        found = np.empty((rows, self.outputs), np.float32)
        self.ggml.tensor_get(products[graph], found.ctypes.data, 0, found.nbytes)
        wanted = given @ self.dense.T
        self.ggml.buffer_free(buffer)
        self.ggml.free(context)
        error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
        return {"seconds": seconds[2:], "error": error, "layout": self.name}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what llama.cpp prints is no answer
    subject: Any = None
    threads = 1
    for line in sys.stdin:
        asked = json.loads(line)
        threads = asked.pop("threads", threads)
        if "version" in asked:
            answer: Any = llama_cpp.__version__
        elif "make" in asked:
            answer = make(asked["make"], asked["sizes"], threads)
        elif "model" in asked:
            subject, answer = Model(asked["model"], asked["places"], threads), {}
        elif "layer" in asked:
            subject, answer = Layer(*asked["layer"], threads), {}
        else:
            answer = subject.run(**asked)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()

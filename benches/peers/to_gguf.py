"""A BF16 checkpoint of DeepSeek-V3's architecture as a GGUF file for llama.cpp, the same numbers bit for bit.

Written from llama.cpp's loader (the keys and tensors that its `deepseek2` architecture reads). kv_b_proj is split per head into
what makes keys (transposed) and what makes values, so that llama.cpp computes MLA absorbed, with one latent per token in its
cache. There is no tokenizer: measurements and comparisons use token ids. Layers of multi-token prediction are left out.

    python to_gguf.py CHECKPOINT_FOLDER OUT.gguf
"""

import json
import sys
from pathlib import Path

import numpy as np
from gguf import ExpertGatingFuncType, GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType

ARCH = "deepseek2"
# llama.cpp takes models with so many layers for DeepSeek-V2-Lite, whose queries have no latent.
LITE_LAYERS = (26, 27)


class Unsupported(Exception):
    """The checkpoint is none that is converted here."""


class Checkpoint:
    """The tensors of a folder of safetensors, mapped."""

    WIDTHS = {"BF16": np.uint16, "F32": np.float32}

    def __init__(self, folder):
        self.folder = Path(folder)
        self.config = json.loads((self.folder / "config.json").read_text())
        self.tensors = {}
        index = self.folder / "model.safetensors.index.json"
        files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
        for name in files:
            raw = np.memmap(self.folder / name, np.uint8, "r")
            header_len = int(raw[:8].view("<u8")[0])
            header = json.loads(raw[8 : 8 + header_len].tobytes())
            header.pop("__metadata__", None)
            for tensor, entry in header.items():
                start, end = entry["data_offsets"]
                self.tensors[tensor] = (entry["dtype"], entry["shape"], raw[8 + header_len + start : 8 + header_len + end])

    def shape(self, name):
        return self.tensors[name][1]

    def dtype(self, name):
        return self.tensors[name][0]

    def array(self, name):
        """BF16 as uint16, F32 as float32."""
        dtype, shape, data = self.tensors[name]
        if dtype not in self.WIDTHS:
            raise Unsupported(f"{name} is {dtype}; convert the BF16 form of the checkpoint")
        return np.frombuffer(data.tobytes(), self.WIDTHS[dtype]).reshape(shape)


def to_f32(array):
    """Exact."""
    return array if array.dtype == np.float32 else (array.astype(np.uint32) << 16).view(np.float32)


class Tensor:
    """One tensor of the GGUF file, whose data is made when it is written."""

    def __init__(self, name, shape, kind, make):
        self.name, self.shape, self.kind, self.make = name, tuple(int(n) for n in shape), kind, make

    def widened(self):
        """The same numbers as F32."""
        return Tensor(self.name, self.shape, GGMLQuantizationType.F32, lambda: to_f32(self.make()))

    @property
    def size_bytes(self):
        return int(np.prod(self.shape)) * (2 if self.kind == GGMLQuantizationType.BF16 else 4)


def tensors(ck):
    """All tensors in the order in which they are written."""
    c, out = ck.config, []

    def matrix(name, source):
        if ck.dtype(source) != "BF16":
            raise Unsupported(f"{source} is {ck.dtype(source)}; convert the BF16 form of the checkpoint")
        out.append(Tensor(name, ck.shape(source), GGMLQuantizationType.BF16, lambda: ck.array(source)))

    def vector(name, source):
        out.append(Tensor(name, ck.shape(source), GGMLQuantizationType.F32, lambda: to_f32(ck.array(source))))

    heads, rank = c["num_attention_heads"], c["kv_lora_rank"]
    nope, value = c["qk_nope_head_dim"], c["v_head_dim"]

    def kv_b(layer):
        return ck.array(f"model.layers.{layer}.self_attn.kv_b_proj.weight").reshape(heads, nope + value, rank)

    matrix("token_embd.weight", "model.embed_tokens.weight")
    vector("output_norm.weight", "model.norm.weight")
    if not c.get("tie_word_embeddings"):
        matrix("output.weight", "lm_head.weight")
    for layer in range(c["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        vector(theirs + "attn_norm.weight", ours + "input_layernorm.weight")
        vector(theirs + "ffn_norm.weight", ours + "post_attention_layernorm.weight")
        attn = ours + "self_attn."
        matrix(theirs + "attn_q_a.weight", attn + "q_a_proj.weight")
        vector(theirs + "attn_q_a_norm.weight", attn + "q_a_layernorm.weight")
        matrix(theirs + "attn_q_b.weight", attn + "q_b_proj.weight")
        matrix(theirs + "attn_kv_a_mqa.weight", attn + "kv_a_proj_with_mqa.weight")
        vector(theirs + "attn_kv_a_norm.weight", attn + "kv_a_layernorm.weight")
        bf16 = GGMLQuantizationType.BF16
        keys = lambda layer=layer: np.ascontiguousarray(kv_b(layer)[:, :nope].transpose(0, 2, 1))
        values = lambda layer=layer: np.ascontiguousarray(kv_b(layer)[:, nope:])
        out.append(Tensor(theirs + "attn_k_b.weight", (heads, rank, nope), bf16, keys))
        out.append(Tensor(theirs + "attn_v_b.weight", (heads, value, rank), bf16, values))
        matrix(theirs + "attn_output.weight", attn + "o_proj.weight")
        if layer < c["first_k_dense_replace"]:
            for part in ("gate", "up", "down"):
                matrix(theirs + f"ffn_{part}.weight", ours + f"mlp.{part}_proj.weight")
            continue
        router = ours + "mlp.gate.weight"
        vector(theirs + "ffn_gate_inp.weight", router)
        if c.get("topk_method") == "noaux_tc":
            vector(theirs + "exp_probs_b.bias", ours + "mlp.gate.e_score_correction_bias")
        for part in ("gate", "up", "down"):
            names = [f"{ours}mlp.experts.{e}.{part}_proj.weight" for e in range(c["n_routed_experts"])]
            stack = lambda names=names: np.stack([ck.array(name) for name in names])
            shape = (len(names), *ck.shape(names[0]))
            out.append(Tensor(theirs + f"ffn_{part}_exps.weight", shape, bf16, stack))
            matrix(theirs + f"ffn_{part}_shexp.weight", ours + f"mlp.shared_experts.{part}_proj.weight")
    return out


def check(c):
    """Refuses what llama.cpp would compute differently."""
    if c.get("model_type") not in ("deepseek_v3", "deepseek_v2"):
        raise Unsupported(f"model_type {c.get('model_type')}; deepseek_v3 and deepseek_v2 are converted")
    if c.get("quantization_config"):
        raise Unsupported("the checkpoint is quantized; convert its BF16 form")
    if not c.get("q_lora_rank") or c["num_hidden_layers"] in LITE_LAYERS:
        raise Unsupported(f"{c['num_hidden_layers']} layers, q_lora_rank {c.get('q_lora_rank')}: llama.cpp reads this as V2-Lite")
    if c.get("topk_method") not in ("noaux_tc", None):
        raise Unsupported(f"topk_method {c['topk_method']}: llama.cpp chooses groups by their two best experts alone")
    if c.get("moe_layer_freq", 1) != 1:
        raise Unsupported("moe_layer_freq other than 1")
    scaling = c.get("rope_scaling")
    if scaling:
        if scaling.get("type", scaling.get("rope_type")) != "yarn":
            raise Unsupported(f"rope_scaling {scaling}")
        if scaling.get("mscale") != scaling.get("mscale_all_dim"):
            raise Unsupported("mscale and mscale_all_dim differ, which llama.cpp does not read")


def metadata(writer, c, file_type):
    """The keys that llama.cpp's loader asks for."""
    rope = c["qk_rope_head_dim"]
    writer.add_name("DeepSeek-V3-shaped")
    writer.add_file_type(file_type)
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    # Absorbed, all heads share one key: the latent and the rotated part.
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_vocab_size(c["vocab_size"])
    writer.add_q_lora_rank(c["q_lora_rank"])
    writer.add_kv_lora_rank(c["kv_lora_rank"])
    writer.add_key_length(c["kv_lora_rank"] + rope)
    writer.add_value_length(c["kv_lora_rank"])
    writer.add_key_length_mla(c["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(c["v_head_dim"])
    writer.add_rope_dimension_count(rope)
    writer.add_rope_freq_base(float(c.get("rope_theta", 10000)))
    writer.add_leading_dense_block_count(c["first_k_dense_replace"])
    writer.add_expert_count(c["n_routed_experts"])
    writer.add_expert_used_count(c["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(c["moe_intermediate_size"])
    writer.add_expert_shared_count(c["n_shared_experts"])
    writer.add_expert_weights_scale(float(c["routed_scaling_factor"]))
    writer.add_expert_weights_norm(bool(c["norm_topk_prob"]))
    sigmoid = c.get("scoring_func", "softmax") == "sigmoid"
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID if sigmoid else ExpertGatingFuncType.SOFTMAX)
    groups, chosen = c.get("n_group") or 1, c.get("topk_group") or 1
    if chosen < groups:
        writer.add_expert_group_count(groups)
        writer.add_expert_group_used_count(chosen)
    scaling = c.get("rope_scaling")
    if scaling:
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(float(scaling.get("beta_fast", 32)))
        writer.add_rope_scaling_yarn_beta_slow(float(scaling.get("beta_slow", 1)))
        # llama.cpp multiplies the logarithm of the factor by ten times this.
        writer.add_rope_scaling_yarn_log_mul(0.1 * float(scaling.get("mscale_all_dim", 0)))
    writer.add_tokenizer_model("none")


def convert(folder, path, widen=False):
    """Writes `path`, all of it as F32 where `widen` asks for that; holds one tensor in memory at a time."""
    ck = Checkpoint(folder)
    check(ck.config)
    partial = Path(f"{path}.partial")
    writer = GGUFWriter(partial, ARCH)
    metadata(writer, ck.config, LlamaFileType.ALL_F32 if widen else LlamaFileType.MOSTLY_BF16)
    todo = [tensor.widened() if widen else tensor for tensor in tensors(ck)]
    for tensor in todo:
        # BF16 travels as bytes, since numpy has no such type.
        is_bf16 = tensor.kind == GGMLQuantizationType.BF16
        shape = (*tensor.shape[:-1], 2 * tensor.shape[-1]) if is_bf16 else tensor.shape
        dtype = np.dtype(np.uint8 if is_bf16 else np.float32)
        writer.add_tensor_info(tensor.name, shape, dtype, tensor.size_bytes, tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in todo:
        data = tensor.make()
        assert data.shape == tensor.shape and data.nbytes == tensor.size_bytes, tensor.name
        writer.write_tensor_data(data)
    writer.close()
    partial.rename(path)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        convert(sys.argv[1], Path(sys.argv[2]))
    except Unsupported as why:
        sys.exit(f"cannot convert: {why}")

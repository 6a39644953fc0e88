"""Writes tests/goldens: tiny random checkpoints in the published layout, with the logits an independent implementation computes on them.

    python make.py [NAME ...] [--out DIR]        names: the toys below, and tiny_r1 for the bundled model's replies

Each toy is a folder: config.json, the checkpoint, golden.safetensors and golden.json (README.md says what is in them). The reference is
transformers in eager float32; plain.py must agree with it to AGREE before anything is written. Token ids are drawn one by one such that
every choice the model makes, of a token, of an expert or of a group, has room: a right implementation cannot fall on the other side of it.
"""
import argparse
import json
import math
import platform
import shutil
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import torch
import transformers
from safetensors.torch import save_file
from transformers.modeling_layers import MtpModel

import replies
from plain import BLOCK, E4M3_MAX, Plain, read_checkpoint, widen

ROOT = Path(__file__).resolve().parents[2]
AGREE = 1e-5  # relative RMS error allowed between the two oracles in float32
NOTICED = 1e-2  # least relative RMS error that a mistake must cause
NUM_TOKENS = 56
LOGIT_MARGIN = 0.2  # between the best two logits; logits have a standard deviation near 1
ROUTE_MARGIN = 0.03  # between the last chosen and the first rejected expert or group: in scores (sigmoid), in log-scores (softmax)

COMMON = dict(
    attention_bias=False, attention_dropout=0.0, aux_loss_alpha=0.001, bos_token_id=0, eos_token_id=1, ep_size=1, first_k_dense_replace=1,
    hidden_act="silu", initializer_range=0.02, moe_layer_freq=1, num_hidden_layers=3, pretraining_tp=1,
    rms_norm_eps=1e-6, rope_theta=10000, seq_aux=True, tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True, vocab_size=128,
)
YARN = dict(type="yarn", factor=40, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0, original_max_position_embeddings=128)  # short, so that 56 tokens feel it
V3 = COMMON | dict(
    architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=True,
    routed_scaling_factor=2.5, n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4, n_shared_experts=1,
    num_nextn_predict_layers=0, rope_scaling=YARN, max_position_embeddings=5120,
)
V2 = COMMON | dict(
    architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2", scoring_func="softmax", norm_topk_prob=False,
    n_routed_experts=16, num_experts_per_tok=4, n_shared_experts=2, rope_scaling=YARN | dict(mscale=0.707, mscale_all_dim=0.707),
    max_position_embeddings=5120,
)
SMALL = dict(hidden_size=64, intermediate_size=96, moe_intermediate_size=8, num_attention_heads=4, num_key_value_heads=4,
             q_lora_rank=24, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16)
FP8 = dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[BLOCK, BLOCK])


@dataclass
class Toy:
    """One fixture: what is special about its config, how its weights are stored, and the seed of both weights and tokens."""

    about: str
    config: dict
    storage: str = "bf16"  # f32, bf16 or fp8
    shards: int = 1
    bias_mean: float = 0.0  # of e_score_correction_bias; well below zero some biased scores are negative
    seed: int = 1
    scale_fmt: dict = field(default_factory=dict)  # more for quantization_config


TOYS = {
    "toy_v3_f32": Toy(
        "V3 in F32 with negative biased scores, so that masking groups with 0 is not masking them with -inf.",
        V3 | SMALL | dict(hidden_size=48, qk_rope_head_dim=8, torch_dtype="float32"), storage="f32", bias_mean=-0.5),
    "toy_v3_bf16": Toy("V3 in BF16, three shards, with a multi-token-prediction layer.", V3 | SMALL | dict(num_nextn_predict_layers=1), shards=3),
    "toy_v3_fp8": Toy(
        "V3 in the official FP8 form, two or more blocks in N or K for most projections.",
        V3 | dict(hidden_size=144, intermediate_size=160, moe_intermediate_size=16, num_attention_heads=4, num_key_value_heads=4,
                  q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32), storage="fp8", seed=4),
    "toy_ragged_fp8": Toy(
        "FP8 blocks ragged in both directions, heads that begin, split into nope and v, and are sharded inside a block; V3.1's ue8m0 activation scales; Kimi-K2's YaRN (beta_fast = beta_slow).",
        V3 | dict(hidden_size=160, intermediate_size=144, moe_intermediate_size=40, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=6,
                  q_lora_rank=144, kv_lora_rank=136, qk_nope_head_dim=24, qk_rope_head_dim=16, v_head_dim=24,
                  n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2, n_shared_experts=2, routed_scaling_factor=2.827,
                  rope_theta=50000, rope_scaling=YARN | dict(factor=32, beta_fast=1, beta_slow=1), max_position_embeddings=4096),
        storage="fp8", bias_mean=-0.5, scale_fmt=dict(scale_fmt="ue8m0")),
    "toy_v2_lite": Toy(
        "V2-Lite: q_proj without LoRA, greedy softmax routing, weights not normalised, YaRN with mscale 0.707.",
        V2 | SMALL | dict(q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0)),
    "toy_v2": Toy(
        "V2: group_limited_greedy, scaling 16; mscale 1 over mscale_all_dim 0.707, so cos and sin are scaled too.",
        V2 | SMALL | dict(topk_method="group_limited_greedy", n_group=8, topk_group=3, routed_scaling_factor=16.0,
                          rope_scaling=YARN | dict(mscale=1.0, mscale_all_dim=0.707))),
    "toy_moonlight": Toy(
        "Moonlight: V3 routing with one group, no q LoRA, no YaRN, rope_theta 50000, two shared experts.",
        V3 | SMALL | dict(q_lora_rank=None, n_group=1, topk_group=1, num_experts_per_tok=6, n_shared_experts=2, routed_scaling_factor=2.446,
                          rope_theta=50000, rope_scaling=None, max_position_embeddings=8192)),
}


def tensor_shapes(c):
    """(name, shape, kind) of every tensor of the checkpoint in order; kind: linear (FP8 where FP8 is stored), plain, norm, bias or embedding."""
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    qk = c["qk_nope_head_dim"] + c["qk_rope_head_dim"]

    def mlp(p, width):
        yield p + "gate_proj.weight", (width, hidden), "linear"
        yield p + "up_proj.weight", (width, hidden), "linear"
        yield p + "down_proj.weight", (hidden, width), "linear"

    def layer(i):
        p = f"model.layers.{i}."
        a = p + "self_attn."
        yield p + "input_layernorm.weight", (hidden,), "norm"
        if c["q_lora_rank"] is None:
            yield a + "q_proj.weight", (heads * qk, hidden), "linear"
        else:
            yield a + "q_a_proj.weight", (c["q_lora_rank"], hidden), "linear"
            yield a + "q_a_layernorm.weight", (c["q_lora_rank"],), "norm"
            yield a + "q_b_proj.weight", (heads * qk, c["q_lora_rank"]), "linear"
        yield a + "kv_a_proj_with_mqa.weight", (c["kv_lora_rank"] + c["qk_rope_head_dim"], hidden), "linear"
        yield a + "kv_a_layernorm.weight", (c["kv_lora_rank"],), "norm"
        yield a + "kv_b_proj.weight", (heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), c["kv_lora_rank"]), "linear"
        yield a + "o_proj.weight", (hidden, heads * c["v_head_dim"]), "linear"
        yield p + "post_attention_layernorm.weight", (hidden,), "norm"
        if i < c["first_k_dense_replace"]:
            yield from mlp(p + "mlp.", c["intermediate_size"])
            return
        yield p + "mlp.gate.weight", (c["n_routed_experts"], hidden), "plain"
        if c["topk_method"] == "noaux_tc":
            yield p + "mlp.gate.e_score_correction_bias", (c["n_routed_experts"],), "bias"
        for e in range(c["n_routed_experts"]):
            yield from mlp(f"{p}mlp.experts.{e}.", c["moe_intermediate_size"])
        yield from mlp(p + "mlp.shared_experts.", c["moe_intermediate_size"] * c["n_shared_experts"])

    layers = c["num_hidden_layers"]
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden), "embedding"
    for i in range(layers):
        yield from layer(i)
    yield "model.norm.weight", (hidden,), "norm"
    yield "lm_head.weight", (c["vocab_size"], hidden), "plain"
    for i in range(layers, layers + c.get("num_nextn_predict_layers", 0)):
        p = f"model.layers.{i}."
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            yield f"{p}{norm}.weight", (hidden,), "norm"
        yield p + "eh_proj.weight", (hidden, 2 * hidden), "plain"
        yield from layer(i)


def quantize(w):
    """F32 [N, K] to e4m3 [N, K] and its scale_inv [ceil(N/128), ceil(K/128)]; edge blocks are ragged."""
    n, k = w.shape
    rows, cols = -(-n // BLOCK), -(-k // BLOCK)
    padded = torch.zeros(rows * BLOCK, cols * BLOCK)
    padded[:n, :k] = w
    tiles = padded.view(rows, BLOCK, cols, BLOCK)
    scale = tiles.abs().amax((1, 3)) / E4M3_MAX
    return (tiles / scale[:, None, :, None]).view(rows * BLOCK, cols * BLOCK)[:n, :k].to(torch.float8_e4m3fn).contiguous(), scale


def weights(toy, generator):
    """Every tensor of the checkpoint as it is stored, in order."""
    c, out = toy.config, {}
    narrow = torch.float32 if toy.storage == "f32" else torch.bfloat16
    for name, shape, kind in tensor_shapes(c):
        noise = torch.randn(shape, generator=generator)
        if kind == "bias":
            out[name] = toy.bias_mean + (0.2 if toy.bias_mean else 0.1) * noise  # F32 in the published files
        elif kind == "norm":
            out[name] = (1 + 0.1 * noise).to(narrow)
        elif kind == "embedding":
            out[name] = noise.to(narrow)
        elif kind == "linear" and toy.storage == "fp8":
            out[name], out[name + "_scale_inv"] = quantize(noise / math.sqrt(shape[-1]))
        else:
            out[name] = (noise / math.sqrt(shape[-1])).to(narrow)
    for i in range(c["num_hidden_layers"], c["num_hidden_layers"] + c.get("num_nextn_predict_layers", 0)):
        out[f"model.layers.{i}.embed_tokens.weight"] = out["model.embed_tokens.weight"].clone()
        out[f"model.layers.{i}.shared_head.head.weight"] = out["lm_head.weight"].clone()
    return out


def write_checkpoint(folder, config, tensors, shards):
    """config.json and model.safetensors, or `shards` files of about one size with their index."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    size = lambda t: t.numel() * t.element_size()
    total, parts, done = sum(map(size, tensors.values())), [{} for _ in range(shards)], 0
    for name, t in tensors.items():
        parts[min(done * shards // total, shards - 1)][name] = t
        done += size(t)
    index = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05d}-of-{shards:06d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    (folder / "model.safetensors.index.json").write_text(text + "\n")


def transformers_model(folder, dtype=torch.float32):
    """transformers' model of a checkpoint folder, FP8 weights widened to F32 first; it needs the folder only while loading."""
    config = json.loads((folder / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    model_class._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{config['num_hidden_layers']}\..*"]  # the MTP layer
    options = dict(dtype=dtype, attn_implementation="eager", experts_implementation="eager")
    if "quantization_config" not in config:
        return model_class.from_pretrained(folder, **options).eval()
    with tempfile.TemporaryDirectory() as wide:
        del config["quantization_config"]
        write_checkpoint(Path(wide), config | {"torch_dtype": "float32"}, widen(read_checkpoint(folder))[0], 1)
        return model_class.from_pretrained(wide, **options).eval()


def top_two_margin(logits):
    best = logits.topk(2, -1).values
    return best[..., 0] - best[..., 1]


def choose_tokens(models, vocab, generator):
    """NUM_TOKENS tokens such that every model has room at every position; steps back where no token has."""
    draw = lambda: iter(torch.randperm(vocab, generator=generator).tolist())
    ids, untried = [], [draw()]
    while len(ids) < NUM_TOKENS:
        token = next((t for t in untried[-1] if all(roomy(m, torch.tensor([*ids, t])) for m in models)), None)
        if token is not None:
            ids.append(token)
            untried.append(draw())
        elif ids:
            ids.pop()
            untried.pop()
        else:
            raise SystemExit("no sequence with room: try another seed")
    return torch.tensor(ids)


def roomy(model, ids):
    margin = top_two_margin(model.forward(ids)[-1])
    return margin > LOGIT_MARGIN and min(model.route_margin[-1], model.group_margin[-1]) > ROUTE_MARGIN and model.rounding_room[-1]


def gap(expected, found):
    """How far `found` is from `expected`; relative RMS is over the standard deviation of `expected`."""
    diff = expected.double() - found.double()
    return dict(
        relative_rms=float(f"{(diff.pow(2).mean().sqrt() / expected.double().std()).item():.3g}"),
        mean_abs=float(f"{diff.abs().mean().item():.3g}"),
        max_abs=float(f"{diff.abs().max().item():.3g}"),
        argmax_agree=round((expected.argmax(-1) == found.argmax(-1)).float().mean().item(), 4),
    )


def agree(name, expected, found):
    g = gap(expected, found)
    print(f"  {name:44s} {g}")
    if not (g["relative_rms"] < AGREE and g["argmax_agree"] == 1.0):
        raise SystemExit(f"{name}: the two oracles disagree: {g}")
    return g


def rounding_noise(model, ids, logits):
    """The widest gap of 8 runs whose weights were moved by a float32 sum's rounding error.

    An activation on the border between two e4m3 values may fall on either side in a right implementation: this is what that costs.
    """
    exact, generator, gaps = model.w, torch.Generator().manual_seed(0), []
    for _ in range(8):
        model.w = {name: w * (1 + 3e-7 * torch.randn(w.shape, generator=generator)) for name, w in exact.items()}
        gaps.append(gap(logits, model.forward(ids)))
    model.w = exact
    return max(gaps, key=lambda g: g["relative_rms"])


def make_toy(name, toy, out):
    print(name)
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(toy.seed)
    config = toy.config | ({"quantization_config": FP8 | toy.scale_fmt} if toy.storage == "fp8" else {})
    write_checkpoint(folder, config, weights(toy, generator), toy.shards)

    plain = Plain(folder)
    w8a8 = Plain(folder, activations="fp8_ue8m0" if toy.scale_fmt else "fp8") if toy.storage == "fp8" else None
    ids = choose_tokens([plain, w8a8] if w8a8 else [plain], config["vocab_size"], generator)
    model = transformers_model(folder)
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    tensors = {"input_ids": ids, "logits": logits}
    gaps = {"plain": agree("plain against transformers", logits, plain.forward(ids)),
            "plain_absorbed": agree("absorbed against transformers", logits, Plain(folder, absorbed=True).forward(ids)),
            "plain_f64": agree("float64 against transformers", logits, Plain(folder, dtype=torch.float64).forward(ids))}
    margins = {"logits": top_two_margin(logits).min().item(), "experts": plain.route_margin.min().item(), "groups": plain.group_margin.min().item()}

    if toy.storage != "f32":
        with torch.no_grad():
            tensors["logits_bf16"] = transformers_model(folder, torch.bfloat16)(ids[None]).logits[0].float()
        gaps["bf16"] = gap(logits, tensors["logits_bf16"])
    if w8a8:
        tensors["logits_w8a8"] = w8a8.forward(ids)
        gaps["w8a8"] = gap(logits, tensors["logits_w8a8"])
        gaps["w8a8_noise"] = rounding_noise(w8a8, ids, tensors["logits_w8a8"])
        if gaps["w8a8_noise"]["relative_rms"] > 10 * AGREE:
            raise SystemExit(f"{name}: rounding alone moves W8A8 by {gaps['w8a8_noise']}: try another seed")
        gaps["w8a8_absorbed"] = gap(tensors["logits_w8a8"], Plain(folder, activations=w8a8.activations, absorbed=True).forward(ids))
        margins["logits_w8a8"] = top_two_margin(tensors["logits_w8a8"]).min().item()
    if config.get("num_nextn_predict_layers"):
        with torch.no_grad():
            mtp = MtpModel.from_pretrained(model).float()
            hidden = model.model(ids[None]).last_hidden_state[:, :-1]
            drafted = mtp.forward_layer(0, hidden, torch.arange(1, len(ids))[None], None, input_ids=ids[None, 1:])
            tensors["mtp_logits"] = mtp._project_to_logits(drafted)[0]
        plain.forward(ids)
        gaps["mtp_plain"] = agree("MTP: plain against transformers", tensors["mtp_logits"], plain.mtp(ids))

    silent = {"mask_with_zero"} if toy.bias_mean == 0.0 else set()  # all biased scores positive: both masks choose alike
    mistakes = {m: gap(logits, Plain(folder, mistake=m).forward(ids))["relative_rms"] for m in plain.mistakes() if m not in silent}
    for key, g in gaps.items():
        print(f"  {key:44s} {g}")
    print("  margins", margins, "\n  mistakes", mistakes)
    if missed := [m for m, cost in mistakes.items() if not cost > NOTICED]:
        raise SystemExit(f"{name} does not notice {missed}")
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "golden.safetensors")
    about = dict(
        about=toy.about, seed=toy.seed, num_tokens=len(ids), weights=toy.storage,
        reference=f"transformers {config['architectures'][0]}, eager, float32" + (", FP8 weights widened to float32" if w8a8 else ""),
        versions=versions(), tensors={k: f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for k, t in tensors.items()},
        logits_std=round(logits.std().item(), 4), margins={k: float(f"{v:.3g}") if math.isfinite(v) else None for k, v in margins.items()},
        gaps=gaps, mistakes=mistakes,
    )
    (folder / "golden.json").write_text(json.dumps(about, indent=1) + "\n")
    print(f"  {sum(f.stat().st_size for f in folder.iterdir()) / 1024:.0f} KiB")


def versions():
    return dict(python=platform.python_version(), torch=torch.__version__.split("+")[0], transformers=transformers.__version__, safetensors=safetensors.__version__)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of: " + ", ".join([*TOYS, "tiny_r1"]))
    parser.add_argument("--out", type=Path, default=ROOT / "tests/goldens")
    args = parser.parse_args()
    if unknown := set(args.names) - {*TOYS, "tiny_r1"}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # one order of summation on every machine
    for name, toy in TOYS.items():
        if not args.names or name in args.names:
            make_toy(name, toy, args.out)
    if not args.names or "tiny_r1" in args.names:
        replies.make(args.out / "tiny_r1.json", ROOT, transformers_model(ROOT / "crates/cli/model"), versions())


if __name__ == "__main__":
    main()

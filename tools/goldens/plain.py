"""DeepSeek V2 and V3 in plain torch, straight from the reports: the second opinion on every golden.

Independent of transformers and of r1-serve. Naive or absorbed MLA; weights widened from FP8; activations left alone or quantised
as the FP8 path does (per token and per 128 channels). Each well-known mistake is a switch, so that its price can be measured.
One sequence at a time, no cache: this is for reading, not for speed.
"""
import glob
import json
import math

import torch
import torch.nn.functional as F
from safetensors import safe_open

BLOCK = 128
E4M3_MAX = 448.0
BORDER = 1e-6  # of a block's amax: a few times what float32 sums of different order differ by

# Mistakes that can be made with any of the models, and those that need sigmoid or softmax routing to be made.
MISTAKES = ("half_split_rope", "no_yarn", "no_mscale_squared", "no_rope_mscale", "no_group_limit", "no_routed_scaling_factor", "unnormed_latent", "no_shared_expert")
SIGMOID_MISTAKES = ("softmax_scores", "no_correction_bias", "biased_weights", "group_score_by_max", "mask_with_zero", "no_norm_topk_prob")
SOFTMAX_MISTAKES = ("sigmoid_scores", "group_score_by_top_two", "norm_topk_prob")


def read_checkpoint(folder):
    """Every tensor of a checkpoint folder by name, as stored."""
    tensors = {}
    for file in sorted(glob.glob(f"{folder}/model*.safetensors")):
        with safe_open(file, "pt") as f:
            tensors.update({name: f.get_tensor(name) for name in f.keys()})
    return tensors


def dequantize(q, scale_inv):
    """e4m3 [N, K] times its 128x128 block scales [ceil(N/128), ceil(K/128)]: F32 [N, K]."""
    n, k = q.shape
    return q.float() * scale_inv.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]


def widen(tensors):
    """(F32 weights without the scale tensors, names of those that were FP8)."""
    fp8 = {name for name, t in tensors.items() if t.dtype == torch.float8_e4m3fn}
    wide = {name: dequantize(t, tensors[name + "_scale_inv"]) if name in fp8 else t.float()
            for name, t in tensors.items() if not name.endswith("_scale_inv")}
    return wide, fp8


def quantize_activations(x, power_of_two):
    """Per token and per 128 channels: scale = amax / 448 (rounded up to a power of two for ue8m0), e4m3, and back to F32.

    Also, per token, whether no value lies so near the border between two e4m3 values that a sum's rounding error could move it across.
    """
    k = x.shape[-1]
    y = F.pad(x.float(), (0, -k % BLOCK)).unflatten(-1, (-1, BLOCK))
    amax = y.abs().amax(-1, keepdim=True).clamp(min=1e-4)
    up = (lambda s: torch.exp2(torch.ceil(torch.log2(s)))) if power_of_two else (lambda s: s)
    scale = up(amax / E4M3_MAX)
    e4m3 = lambda v: (v / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
    room = (e4m3(y - BORDER * amax) == e4m3(y + BORDER * amax)).flatten(1).all(-1)
    if power_of_two:
        room &= (up(amax / E4M3_MAX * (1 - BORDER)) == up(amax / E4M3_MAX * (1 + BORDER))).flatten(1).all(-1)
    return (e4m3(y) * scale).flatten(-2)[..., :k], room


class Plain:
    """One checkpoint, ready to run.

    activations: None (weight-only), "fp8" or "fp8_ue8m0"; absorbed: MLA in the latent space; mistake: a name of the lists above;
    dtype: of the arithmetic. After `forward`, `route_margin` [T] and `group_margin` [T] hold each token's narrowest choice over the
    layers: in scores for sigmoid routing, in log-scores for softmax; `rounding_room` [T] whether all its quantised activations lie clear of
    a border; `hidden` [T, D] the last layer's output before the norm.
    """

    def __init__(self, folder, activations=None, absorbed=False, mistake=None, dtype=torch.float32):
        self.c = c = json.load(open(f"{folder}/config.json"))
        wide, self.fp8 = widen(read_checkpoint(folder))
        self.w = {name: t.to(dtype) for name, t in wide.items()}
        self.activations, self.absorbed, self.mistake, self.dtype = activations, absorbed, mistake, dtype
        dim, base, yarn = c["qk_rope_head_dim"], c["rope_theta"], c.get("rope_scaling")
        freq = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        self.scale, self.rope_mscale = (c["qk_nope_head_dim"] + dim) ** -0.5, 1.0
        if yarn and mistake != "no_yarn":
            edge = lambda turns: dim * math.log(yarn["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(base))
            low, high = max(math.floor(edge(yarn["beta_fast"])), 0), min(math.ceil(edge(yarn["beta_slow"])), dim - 1)
            ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
            freq = freq / yarn["factor"] * ramp + freq * (1 - ramp)
        if yarn:
            mscale = lambda m: 0.1 * m * math.log(yarn["factor"]) + 1.0
            if mistake != "no_mscale_squared":
                self.scale *= mscale(yarn["mscale_all_dim"]) ** 2
            if mistake != "no_rope_mscale":
                self.rope_mscale = mscale(yarn["mscale"]) / mscale(yarn["mscale_all_dim"])
        self.freq = freq.float()

    def mistakes(self):
        """The mistakes that can be made with this model."""
        c, yarn = self.c, self.c.get("rope_scaling")
        out = MISTAKES + (SIGMOID_MISTAKES if c["scoring_func"] == "sigmoid" else SOFTMAX_MISTAKES)
        grouped = c["topk_method"] != "greedy" and c["n_group"] > 1
        absent = set() if yarn else {"no_yarn", "no_mscale_squared", "no_rope_mscale"}
        absent |= set() if yarn and yarn["mscale"] != yarn["mscale_all_dim"] else {"no_rope_mscale"}
        absent |= set() if grouped else {"no_group_limit", "group_score_by_max", "group_score_by_top_two", "mask_with_zero"}
        absent |= {"no_routed_scaling_factor"} if c["routed_scaling_factor"] == 1.0 else set()
        return [name for name in out if name not in absent]

    def linear(self, x, name, tokens=slice(None)):
        """x [N, K], whose rows belong to `tokens`, times the weight's transpose."""
        if self.activations and name in self.fp8:
            x, room = quantize_activations(x, self.activations == "fp8_ue8m0")
            self.rounding_room[tokens] &= room
            x = x.to(self.dtype)
        return x @ self.w[name].T

    def norm(self, x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.c["rms_norm_eps"]) * self.w[name]

    def rope(self, x, positions):
        """Interleaved pairs (2i, 2i+1); x [..., T, qk_rope_head_dim]."""
        angle = positions.float()[:, None] * self.freq
        cos, sin = (angle.cos() * self.rope_mscale).to(self.dtype), (angle.sin() * self.rope_mscale).to(self.dtype)
        if self.mistake == "half_split_rope":
            a, b = x.chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)

    def attention(self, x, layer, positions):
        c, p, n = self.c, f"model.layers.{layer}.self_attn.", x.shape[0]
        heads, nope, rope, v, lora = (c[k] for k in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"))
        if c["q_lora_rank"] is None:
            q = self.linear(x, p + "q_proj.weight")
        else:
            q = self.linear(self.norm(self.linear(x, p + "q_a_proj.weight"), p + "q_a_layernorm.weight"), p + "q_b_proj.weight")
        q_nope, q_rope = q.view(n, heads, nope + rope).transpose(0, 1).split([nope, rope], -1)
        latent, k_rope = self.linear(x, p + "kv_a_proj_with_mqa.weight").split([lora, rope], -1)
        if self.mistake != "unnormed_latent":
            latent = self.norm(latent, p + "kv_a_layernorm.weight")
        q_rope, k_rope = self.rope(q_rope, positions), self.rope(k_rope, positions)
        causal = torch.full((n, n), float("-inf"), dtype=self.dtype).triu(1)
        if self.absorbed:
            w = self.w[p + "kv_b_proj.weight"].view(heads, nope + v, lora)
            q_latent = torch.einsum("htd,hdc->htc", q_nope, w[:, :nope])
            scores = (q_latent @ latent.T + q_rope @ k_rope.T) * self.scale + causal
            out = torch.einsum("htc,hdc->htd", scores.softmax(-1) @ latent, w[:, nope:])
        else:
            k_nope, value = self.linear(latent, p + "kv_b_proj.weight").view(n, heads, nope + v).transpose(0, 1).split([nope, v], -1)
            scores = (q_nope @ k_nope.transpose(1, 2) + q_rope @ k_rope.T) * self.scale + causal
            out = scores.softmax(-1) @ value
        return self.linear(out.transpose(0, 1).reshape(n, heads * v), p + "o_proj.weight")

    def mlp(self, x, p, tokens=slice(None)):
        gate, up = self.linear(x, p + "gate_proj.weight", tokens), self.linear(x, p + "up_proj.weight", tokens)
        return self.linear(F.silu(gate) * up, p + "down_proj.weight", tokens)

    def route(self, x, p):
        """Expert indices and weights [T, num_experts_per_tok]; notes the margins of the choice."""
        c, k = self.c, self.c["num_experts_per_tok"]
        sigmoid = (c["scoring_func"] == "sigmoid" and self.mistake != "softmax_scores") or self.mistake == "sigmoid_scores"
        logits = x @ self.w[p + "gate.weight"].T
        scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
        choice = scores
        if c["topk_method"] == "noaux_tc" and self.mistake != "no_correction_bias":
            choice = scores + self.w[p + "gate.e_score_correction_bias"]
        gap = (lambda a, b: a - b) if c["scoring_func"] == "sigmoid" else (lambda a, b: (a / b).log())
        if c["topk_method"] != "greedy" and c["n_group"] > 1 and self.mistake != "no_group_limit":
            groups = choice.unflatten(-1, (c["n_group"], -1))
            top_two = (c["topk_method"] == "noaux_tc" and self.mistake != "group_score_by_max") or self.mistake == "group_score_by_top_two"
            group_scores = groups.topk(2, -1).values.sum(-1) if top_two else groups.amax(-1)
            best = group_scores.sort(-1, descending=True)
            keep = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best.indices[:, : c["topk_group"]], True)
            self.group_margin = torch.minimum(self.group_margin, gap(best.values[:, c["topk_group"] - 1], best.values[:, c["topk_group"]]))
            masked = 0.0 if self.mistake == "mask_with_zero" else float("-inf")
            choice = groups.masked_fill(~keep[..., None], masked).flatten(1)
        ranked = choice.sort(-1, descending=True)
        self.route_margin = torch.minimum(self.route_margin, gap(ranked.values[:, k - 1], ranked.values[:, k]).nan_to_num(nan=math.inf))
        chosen = ranked.indices[:, :k]
        weights = (choice if self.mistake == "biased_weights" else scores).gather(1, chosen)
        if (c["norm_topk_prob"] and self.mistake != "no_norm_topk_prob") or self.mistake == "norm_topk_prob":
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights if self.mistake == "no_routed_scaling_factor" else weights * c["routed_scaling_factor"]

    def moe(self, x, p):
        chosen, weights = self.route(x, p)
        y = torch.zeros_like(x)
        for expert in range(self.c["n_routed_experts"]):
            token, slot = torch.where(chosen == expert)
            if len(token):
                y[token] += self.mlp(x[token], f"{p}experts.{expert}.", token) * weights[token, slot, None]
        return y if self.mistake == "no_shared_expert" else y + self.mlp(x, p + "shared_experts.")

    def layer(self, h, i, positions):
        p = f"model.layers.{i}."
        h = h + self.attention(self.norm(h, p + "input_layernorm.weight"), i, positions)
        x = self.norm(h, p + "post_attention_layernorm.weight")
        return h + (self.mlp(x, p + "mlp.") if i < self.c["first_k_dense_replace"] else self.moe(x, p + "mlp."))

    @torch.no_grad()
    def forward(self, ids):
        """Logits [T, V] of token ids [T]."""
        self.route_margin = self.group_margin = torch.full((len(ids),), math.inf, dtype=self.dtype)
        self.rounding_room = torch.ones(len(ids), dtype=torch.bool)
        h, positions = self.w["model.embed_tokens.weight"][ids], torch.arange(len(ids))
        for i in range(self.c["num_hidden_layers"]):
            h = self.layer(h, i, positions)
        self.hidden = h
        return self.norm(h, "model.norm.weight") @ self.w["lm_head.weight"].T

    @torch.no_grad()
    def mtp(self, ids):
        """Draft logits [T-1, V] after `forward(ids)`: row t sees the final-normed hidden state t and token t+1, and predicts token t+2."""
        layer = self.c["num_hidden_layers"]
        p = f"model.layers.{layer}."
        embedded = self.norm(self.w[p + "embed_tokens.weight"][ids[1:]], p + "enorm.weight")
        hidden = self.norm(self.norm(self.hidden, "model.norm.weight")[:-1], p + "hnorm.weight")
        self.route_margin, self.group_margin = self.route_margin[:-1], self.group_margin[:-1]
        x = torch.cat((embedded, hidden), -1) @ self.w[p + "eh_proj.weight"].T
        x = self.layer(x, layer, torch.arange(1, len(ids)))
        return self.norm(x, p + "shared_head.norm.weight") @ self.w[p + "shared_head.head.weight"].T

# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Engram: what is looked up for a sentence
#
# DeepSeek-V4.1 has a second memory beside attention. Each token, together with the few before it, is hashed to rows of a
# very large table; a gate decides how much of what was found is added to the residual streams. This notebook follows one
# sentence through it: compressed ids, windows, rows, collisions, gates.
#
# It uses a small table and a vocabulary of words. The published model has 129,280 tokens and 384 million rows a layer;
# the functions are the same.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from mla_jax.nn import EngramConfig, engram

plt.rcParams.update({"figure.dpi": 80, "font.size": 11})
SENTENCE = ["The", "cat", "sat", "on", "the", "mat", "and", "the", "CAT", "sat", "on", "the", "rug"]

# %% [markdown]
# ## Token ids and compressed ids
#
# Spelling variants of a word should share their memory, so ids are first *compressed*: tokens whose normalised texts are
# equal (case, accents and outer spaces aside) get one id. For a real tokenizer `engram.build_token_map` makes this map,
# with the normaliser the model was trained with (extra `engram`). For a handful of words, lower case does.

# %%
vocabulary = ["<bos>", "<eos>", "<pad>", *dict.fromkeys(SENTENCE), "<image>"]
keys = list(dict.fromkeys(word.lower() for word in vocabulary))
token_map = jnp.array([keys.index(word.lower()) for word in vocabulary], jnp.int32)  # [vocab]
config = EngramConfig.small(
    vocab_size=len(vocabulary),
    compressed_vocab_size=len(keys),
    image_token_id=vocabulary.index("<image>"),
    layer_ids=(1,),
    max_ngram=3,
    heads=2,
    slots=101,
)
tokens = jnp.array([[vocabulary.index(word) for word in SENTENCE]], jnp.int32)  # [1, s]
print(f"{'word':8}{'token id':>10}{'compressed':>12}")
for word, token in zip(SENTENCE[:9], tokens[0].tolist(), strict=False):
    print(f"{word:8}{token:10}{int(token_map[token]):12}")

# %% [markdown]
# ## Windows and rows
#
# A token's window is its compressed id and the ones before it; before the sentence there is padding. For each N-gram order
# (here 2 and 3) the window's entries are multiplied by fixed odd numbers and combined by XOR, and every hash head takes
# that number modulo a prime of its own. The integers have 63 bits; they are computed exactly with 32-bit ones.

# %%
windows, keep = engram.token_windows(config, token_map, tokens)
rows, _ = engram.hash_tokens(config, token_map, tokens)  # [1, s, layers, columns]
print("primes (rows of each head's table):", config.primes[0].tolist(), "rows in all:", config.num_rows[0], "\n")
print(f"{'word':6}{'window, the word first':30}{'rows: order 2 (2 heads), order 3 (2 heads)'}")
for t, word in enumerate(SENTENCE):
    window = " ".join(keys[i] for i in windows[0, t].tolist())
    print(f"{word:6}{window:30}{rows[0, t, 0].tolist()}")

# %% [markdown]
# `sat on the` occurs twice, the first time after `cat`, the second after `CAT`: from `sat` on, the same rows are read. The
# picture marks which pairs of positions share rows, and how many of the four.

# %%
same = (np.asarray(rows)[0, :, None, 0] == np.asarray(rows)[0, None, :, 0]).sum(axis=-1)  # [s, s]
figure, axis = plt.subplots(figsize=(6.4, 5.4), layout="constrained")
image = axis.imshow(same, cmap="Blues")
axis.set_xticks(range(len(SENTENCE)), SENTENCE, rotation=60)
axis.set_yticks(range(len(SENTENCE)), SENTENCE)
axis.set_title("rows that two positions share, of 4")
figure.colorbar(image, ticks=range(5))
plt.show()

# %% [markdown]
# ## Collisions
#
# Different N-grams can meet in a row: with `n` of them and a prime `p`, a share of 1 - exp(-n / p) of lookups does. Heads
# have different primes, so two N-grams that meet in one head part in the others. The curves count random N-grams of which
# at least one other is in the same row: in one given head, and in all eight heads of an order at once.

# %%
big = EngramConfig.v41_flash(slots=20_000, layer_ids=(1,), multipliers=EngramConfig.v41_flash().multipliers[:1])
rng = np.random.default_rng(0)
counts = [500, 1000, 2000, 4000, 8000, 16000, 32000]
one, every = [], []
for n in counts:
    grams = rng.integers(0, big.compressed_vocab_size, (n, big.max_ngram)).astype(np.int32)
    heads = np.asarray(engram.hash_windows(big, jnp.asarray(grams)))[:, 0, : big.heads]  # [n, heads], order 2
    met = np.stack([np.bincount(head)[head] > 1 for head in heads.T])  # [heads, n]
    one.append(met[0].mean())
    every.append(met.all(axis=0).mean())
figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
axis.plot(counts, one, "o", label="in one head")
axis.plot(counts, 1 - np.exp(-np.array(counts) / 20_000), "-", label="1 - exp(-n / p)")
axis.plot(counts, every, "s", label="in all 8 heads")
axis.set(xscale="log", xlabel="different N-grams stored", ylabel="share that meets another")
axis.set_title(f"tables of {big.primes.min()} rows and up")
axis.legend()
plt.show()
print("share in one head:", [round(float(x), 3) for x in one])
print("in all heads:     ", [round(float(x), 3) for x in every])

# %% [markdown]
# ## The gate
#
# What is found becomes a key for each residual stream and one value. The gate compares the key with the stream: it is near
# 1 where they agree, near 0 where they are opposed, about one half where they have nothing to do with each other. So a row
# that belongs to another N-gram need do no harm. Below, the streams of a few words are made to agree with what they find.

# %%
params = engram.init_params(config, jax.random.key(0))
values = np.random.default_rng(1).standard_normal((config.num_rows[0], config.head_dim))
table = engram.place(engram.EngramTable.quantize(values))
embeddings = engram.lookup(table, rows[:, :, 0], dtype=config.dtype)  # [1, s, embedding_dim]
x = jax.random.normal(jax.random.key(2), (1, len(SENTENCE), config.hc_mult, config.hidden_size))
found = (embeddings @ params["wkv"].T).reshape(1, len(SENTENCE), -1, config.hidden_size)[:, :, : config.hc_mult]
agree = jnp.array([word.lower() == "cat" for word in SENTENCE])[None, :, None, None]  # [1, s, 1, 1]
gates, _ = engram.gate(params, config, jnp.where(agree, x + found, x), embeddings)  # [1, s, hc]
figure, axis = plt.subplots(figsize=(8, 2.6), layout="constrained")
image = axis.imshow(gates[0].T, cmap="RdBu_r", vmin=0, vmax=1, aspect="auto")
axis.set_xticks(range(len(SENTENCE)), SENTENCE, rotation=60)
axis.set_yticks(range(config.hc_mult), [f"stream {j}" for j in range(config.hc_mult)])
axis.set_title("gate")
figure.colorbar(image)
plt.show()
mean = lambda chosen: float(jnp.mean(gates, where=jnp.broadcast_to(chosen[..., 0], gates.shape)))  # noqa: E731
print(f"mean gate where streams agree: {mean(agree):.2f}, elsewhere: {mean(~agree):.2f}")

# %% [markdown]
# ## Decoding
#
# A request needs to remember its last N - 1 token ids and nothing else. One token at a time gives the rows of the whole
# sentence, exactly.

# %%
history, steps = engram.init_history(config, 1), []
for t in range(len(SENTENCE)):
    block = tokens[:, t : t + 1]
    steps.append(engram.hash_tokens(config, token_map, block, history, jnp.array([t], jnp.int32))[0])
    history = engram.advance(history, block, jnp.array([1], jnp.int32))
print("equal to one pass:", bool((jnp.concatenate(steps, axis=1) == rows).all()))
print("history:", [vocabulary[i] for i in history[0].tolist()])

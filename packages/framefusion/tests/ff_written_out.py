"""The method of sections 3.2 to 3.5, written out token by token in float64 with loops, to compare with."""

from __future__ import annotations

import math


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    norm = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return dot / norm if norm else 0.0


def predecessor(patch, stream):
    found = []
    for here, (p, s) in enumerate(zip(patch, stream, strict=True)):
        earlier = [i for i in range(here) if p >= 0 and patch[i] == p and stream[i] == s]
        found.append(earlier[-1] if earlier else -1)
    return found


def similarity(rows, prev):
    return [cosine(rows[i], rows[j]) if j >= 0 else -2.0 for i, j in enumerate(prev)]


def required(fractions, cost, layers):
    present, used = 1.0, 0.0
    for fraction in fractions:
        present *= 1 - fraction
        used += present
    left = layers * cost - used
    if left < 0:
        raise ValueError("too small")
    return max(0.0, 1 - left / ((layers - len(fractions)) * present))


def merge(rows, prev, mask, size=None):
    """Rows after merging (None where one vanished), and the anchor of each."""
    size = size or [1] * len(rows)
    anchor = []
    for i in range(len(rows)):
        anchor.append(anchor[prev[i]] if mask[i] else i)
    out = []
    for i in range(len(rows)):
        members = [j for j in range(len(rows)) if anchor[j] == i]
        if mask[i]:
            out.append(None)
            continue
        weight = sum(size[j] for j in members)
        out.append([sum(rows[j][c] * size[j] for j in members) / weight for c in range(len(rows[i]))])
    return out, anchor


class Controller:
    """One sequence; `step` takes rows as lists and returns what is left with its original places."""

    def __init__(self, cost, threshold, floor, patch, stream, layers, scope="vision", weighted=False):
        self.cost, self.threshold, self.floor, self.layers = cost, threshold, floor, layers
        self.patch, self.stream, self.place = list(patch), list(stream), list(range(len(patch)))
        self.fractions, self.merging_done, self.pruning_done = [], False, False
        self.scope = scope
        self.size = [1] * len(patch)
        self.weighted = weighted
        seen = [i for i, p in enumerate(patch) if p >= 0]
        self.span = (seen[0], seen[-1]) if seen else (0, -1)

    def step(self, rows, importance=None):
        if (self.merging_done and self.pruning_done) or len(self.fractions) >= self.layers:
            return rows, self.place
        if self.merging_done:
            return self.prune(rows, importance, required(self.fractions, self.cost, self.layers))
        vision = [i for i, p in enumerate(self.patch) if p >= 0]
        cap = required(self.fractions, self.cost, self.layers)
        prev = predecessor(self.patch, self.stream)
        sim = similarity(rows, prev)
        alike = [i for i in vision if prev[i] >= 0 and sim[i] >= self.threshold]
        fraction = len(alike) / len(vision)
        if fraction < cap:
            spent = self.spent([*self.fractions, fraction])
            if spent > self.layers * self.cost and importance is not None:
                self.merging_done = True
                return self.prune(rows, importance, cap)
            if spent > self.layers * self.cost:
                chosen = self.top(sim, prev, vision, cap)
            else:
                chosen = alike
                self.fractions.append(fraction)
                self.merging_done = fraction < self.floor
        else:
            chosen = self.top(sim, prev, vision, cap)
        mask = [i in set(chosen) for i in range(len(rows))]
        merged, anchor = merge(rows, prev, mask, self.size if self.weighted else None)
        sizes = [sum(self.size[j] for j in range(len(rows)) if anchor[j] == i) for i in range(len(rows))]
        return self.keep([i for i in range(len(rows)) if not mask[i]], merged, sizes)

    def top(self, sim, prev, vision, cap):
        paired = [i for i in vision if prev[i] >= 0]
        wanted = int(cap * len(vision))
        chosen = sorted(paired, key=lambda i: (-sim[i], i))[:wanted]
        self.merging_done = True
        if len(chosen) < wanted:
            self.fractions.append(len(chosen) / len(vision))
        else:
            self.pruning_done = True
        return chosen

    def spent(self, fractions):
        present, used = 1.0, 0.0
        for fraction in fractions:
            present *= 1 - fraction
            used += present
        return used

    def prune(self, rows, importance, sparsity):
        self.pruning_done = True
        if self.scope == "vision":
            competing = [i for i, p in enumerate(self.patch) if p >= 0]
        else:
            competing = [i for i, place in enumerate(self.place) if self.span[0] <= place <= self.span[1]]
        count = round(len(competing) * (1 - sparsity))
        best = set(sorted(competing, key=lambda i: (-importance[i], i))[:count])
        out = set(competing) - best
        return self.keep([i for i in range(len(rows)) if i not in out], rows, self.size)

    def keep(self, left, rows, sizes):
        self.patch = [self.patch[i] for i in left]
        self.stream = [self.stream[i] for i in left]
        self.place = [self.place[i] for i in left]
        self.size = [sizes[i] for i in left]
        return [rows[i] for i in left], self.place


def importance(query, key, scaling, valid=None):
    """query [H][Q][d], key [Hk][N][d] as lists of float64."""
    heads, queries, tokens = len(query), len(query[0]), len(key[0])
    group = heads // len(key)
    mean = [0.0] * tokens
    for h in range(heads):
        for q in range(queries):
            seen = [n for n in range(tokens) if n <= tokens - queries + q and (valid is None or valid[n])]
            logits = {
                n: scaling * sum(a * b for a, b in zip(query[h][q], key[h // group][n], strict=True)) for n in seen
            }
            top = max(logits.values(), default=0.0)
            total = sum(math.exp(x - top) for x in logits.values())
            for n, x in logits.items():
                mean[n] += math.exp(x - top) / total / (heads * queries)
    return mean

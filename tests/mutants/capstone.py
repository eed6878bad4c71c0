"""Wrong solutions of the capstone: task, what went wrong, the right text, the wrong one.

Not here, because nothing notices it: an aggregator that keeps next to nothing of the question itself. Its clues
still depend on the question, so it keeps the contract and learns the task.
"""

SHARE = "share = self.gate(torch.cat([asked, hints], dim=-1)).softmax(dim=2)"
READ = "words = words + (share * hints).sum(dim=2)"
PLACES = "zip((*low, *high), self.modality)"

MUTANTS = [
    ("clue_map", "all words count the same", "clues * counts", "clues"),
    ("clue_map", "divided by the number of words", "(2 * clues.shape[3] * words)", "(2 * clues.shape[3] * clues.shape[4])"),
    ("clue_map", "levels and modalities change places", "(level m) h l t", "(m level) h l t"),
    ("clue_map", "a sum over the heads", "(2 * clues.shape[3] * words)", "(2 * words)"),
    ("clue_map", "a sum over the levels", "(2 * clues.shape[3] * words)", "(clues.shape[3] * words)"),
    ("clue_map", "nan for a question without words", ".clamp(min=torch.finfo(clues.dtype).tiny)", ""),
    ("clue_map", "the largest, not the mean", "\"sum\", m=2)", "\"max\", m=2)"),
    ("clue_map", "divided by the words of the whole batch",
     "reduce(word_weights, \"b k l -> b k 1 1\", \"sum\")", "word_weights.sum()"),
    ("clue_map", "in place on the clues", "clues * counts", "clues.mul_(counts)"),
    ("clue_map", "softmax once more", "return summed / (2 * clues.shape[3] * words)",
     "return (summed / (2 * clues.shape[3] * words)).softmax(-1)"),
    ("pointing", "unknown seconds count", "known = seconds >= 0", "known = seconds >= -1"),
    ("pointing", "the first second counts as unknown", "seconds >= 0", "seconds > 0"),
    ("pointing", "divided by all questions", "known.sum().clamp(min=1)", "known.numel()"),
    ("pointing", "nan where nothing is known", ".clamp(min=1)", ""),
    ("pointing", "the highest over the questions", "argmax(dim=-1)", "argmax(dim=-2)"),
    ("pointing", "the lowest value", "argmax(dim=-1)", "argmin(dim=-1)"),
    ("pointing", "mass of the highest, not of the true second", "seconds.clamp(min=0), \"b k -> b k 1\"",
     "maps.argmax(dim=-1), \"b k -> b k 1\""),
    ("pointing", "results change places",
     "return (mass * known).sum() / count, (hit & known).sum() / count",
     "return (hit & known).sum() / count, (mass * known).sum() / count"),
    ("pointing", "seconds count from 1", "hit = maps.argmax(dim=-1) == seconds", "hit = maps.argmax(dim=-1) + 1 == seconds"),
    ("OwnAggregator", "the mask is ignored", "self.attn(query, stream, mask, need_weights)",
     "self.attn(query, stream, None, need_weights)"),
    ("OwnAggregator", "questions see each other", READ,
     "words = words + (share * hints).sum(dim=2) + words.mean(dim=1, keepdim=True)"),
    ("OwnAggregator", "videos see each other", READ,
     "words = words + (share * hints).sum(dim=2) + hints.mean(dim=(0, 2))[None]"),
    ("OwnAggregator", "softmax over the words", SHARE, SHARE.replace("softmax(dim=2)", "softmax(dim=1)")),
    ("OwnAggregator", "the high level is the low one", "(*low, *high)", "(*low, *low)"),
    ("OwnAggregator", "the low level is never asked", "(*low, *high)", "(*high, *high)"),
    ("OwnAggregator", "only pictures", "(*low, *high)", "(low[0], low[0], high[0], high[0])"),
    ("OwnAggregator", "shows those of the streams in another order", "rearrange(list(weights),",
     "rearrange([w.flip(0) for w in weights],"),
    ("OwnAggregator", "shows even weights on what exists", "rearrange(list(weights),",
     "rearrange([(w > 0) / (w > 0).sum(-1, keepdim=True) for w in weights],"),
    ("OwnAggregator", "shows even weights, whatever it used", "rearrange(list(weights),",
     "rearrange([torch.full_like(w, 1 / w.shape[-1]) for w in weights],"),
    ("OwnAggregator", "questions and words mixed up", "rearrange(words, \"b (k l) d -> b k l d\", k=k)",
     "rearrange(words, \"b (l k) d -> b k l d\", k=k)"),
    ("OwnAggregator", "clues of questions and words mixed up", "\"s b h (k l) t -> b k s h l t\"",
     "\"s b h (l k) t -> b k s h l t\""),
    ("OwnAggregator", "logits in place of weights", "rearrange(list(weights),", "rearrange([w.log() for w in weights],"),
    ("OwnAggregator", "sharpened only for show", "rearrange(list(weights),", "rearrange([w ** 2 for w in weights],"),
    ("OwnAggregator", "knows the number of a segment",
     "x + place)", "x + place + torch.arange(x.shape[1])[:, None] / 3)"),
    ("OwnAggregator", "the gradient of the gate is cut", SHARE, SHARE + ".detach()"),
    ("OwnAggregator", "always returns clues", "if not need_weights: return question, None",
     "weights = [self.attn(query, stream, mask, True)[1] for stream in keys_values]"),
    ("OwnAggregator", "writes nothing of what it found", READ, "words = words + 0 * (share * hints).sum(dim=2)"),
    ("OwnAggregator", "random weights", SHARE, SHARE + " * torch.rand(4, 1)"),
    ("OwnAggregator", "learns nothing: the clues are averaged over time", READ,
     "even = torch.stack([stream.value.mean((1, 2)).repeat(1, self.attn.num_heads) for stream in keys_values], 1)\n"
     "        words = words + (share * even[:, None]).sum(dim=2) + 1e-4 * hints.sum(dim=2)"),
]

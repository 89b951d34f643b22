"""Mutants: does the test suite notice if something breaks? python tests/mutants.py takes hours on two cores for all.

A mutant is a module with one small mistake in it. About a hundred are written by hand, in BY_HAND. The rest are made by
operators on the syntax tree (see `changes`), a share of each module's, picked by a hash of the change itself.

They are made in a copy of the repository, and tests run until one fails: the module's own test files first, then of all
others that import it the tests that pass through the mutated lines (which are noted while the suite runs unmutated).
A mutant that no test notices is a missing test, unless it has a reason; 95 in 100 must be noticed. Not for Windows.
"""
import argparse
import ast
import collections
import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Module: the share of its possible mutants that is tried, and the test files most likely to notice, where they exist.
MODULES = {
    "diffusion_schedules": (0.32, "test_schedules"),
    "ddpm": (0.19, "test_ddpm test_samplers"),
    "diffusion_model": (0.27, "test_model test_checkpoint"),
    "train": (0.17, "test_train test_reports test_resume"),
    "sample": (0.16, "test_sample"),
    "evaluate": (0.08, "test_evaluate test_metrics"),
    "edit": (0.10, "test_edit"),
    "utils/settings": (0.06, "test_settings test_cli test_train"),
    "utils/checkpoint": (0.07, "test_checkpoint test_resume test_hostile_files"),
    "utils/files": (0.10, "test_files test_hostile_files test_hostile_pickles"),
    "utils/data": (0.10, "test_data"),
    "utils/images": (0.10, "test_images"),
    "utils/ranks": (0.15, "test_ranks"),
    "utils/pictures": (0.11, "test_pictures test_edit test_sample"),
    "utils/metrics": (0.06, "test_metrics test_ruler test_evaluate test_reports"),
    "utils/classifier": (0.07, "test_metrics test_evaluate"),
    "utils/muon": (0.20, "test_muon test_devices"),
    "utils/cli": (0.17, "test_cli test_hostile_flags test_sample"),
}

# bug | function (*: anywhere) | old | new [| why it is right that no test notices]. `old` is an expression or
# statement, found by its syntax tree, not its text. "old #2": the second of several. "a && b": two changes at once.
# $ in `new` stands for `old`. Rows with "classic" are bugs that diffusion codebases have had again and again.
BY_HAND = """
[diffusion_schedules]
classic: few steps stop at t = 1 | sampling_timesteps | place[0] | place[min(1, T - 1)]
[ddpm]
neighbours share a stream | fold_in | np.random.SeedSequence(numbers) | np.random.SeedSequence(sum(numbers))
one stream for all images | ImageNoise | fold_in(seed, i) | fold_in(seed, 0)
classic: float32 cumulative product | DDPM | torch.cumprod(self.alphas, dim=0) | self.alphas.float().cumprod(0).double()
classic: alpha_bar shifted by one | DDPM | torch.cumprod(self.alphas, dim=0) | torch.cat([torch.ones(1), $[:-1]])
classic: variance where the standard deviation belongs | DDPM | (1 - self.alpha_bars).sqrt() | 1 - self.alpha_bars
classic: beta for the posterior variance | DDPM | (1 - previous) / (1 - self.alpha_bars) * self.betas | self.betas
posterior mean: alpha_bar_t for alpha_bar_{t-1} | DDPM | previous.sqrt() | self.alpha_bars.sqrt()
tables keep the type of the first images | DDPM._at | (name, x.dtype, x.device) | (name, x.device)
one timestep for the batch | DDPM._at | self._cast[key][t] | self._cast[key][t[:1]]
classic: t off by one when handed to the network | loss | model(x_t, t) | model(x_t, t + 1)
no gradient through the prediction | loss | model(x_t, t) | $.detach()
the clip stops the gradient | clipped_noise_from_v | (x0_hat.clamp(-1, 1) - x0_hat).detach | $.__self__.clone
classic: stale noise after the clip | DDPM | self.predict_noise(x_t, t, x0_hat) |
  self._at("sqrt_alpha_bars", x_t, t) * v + self._at("sqrt_one_minus_alpha_bars", x_t, t) * x_t
classic: stale noise after the clip, in sampling | _reverse_process |
  a_t, x0_hat = alpha_bars[t], self._x0_hat(model, x, t, clip) |
  $; x = x + math.sqrt(a_t) * (x0_hat - self._x0_hat(model, x, t, False))
inpainting never goes back | inpaint | left | False
sampling keeps the graph | _reverse_process | torch.no_grad() | lambda f: f
classic: sampling stops at t = 1 | _reverse_process | timesteps[1:] + [None] | timesteps[1:]
classic: t off by one when handed to the network, in sampling | _reverse_process | t #2 | t + 1
classic: noise added at the last step | _reverse_process | x0_hat #2 | x0_hat + 0.01 * noise_fn(x)
classic: 1/sqrt(alpha) dropped | ddpm_step | mean + math.sqrt(sigma2) * noise_fn(x) | math.sqrt(alpha) * $
classic: coefficient of the noise wrong | ddpm_step | math.sqrt(a_s) * (1 - alpha) | math.sqrt(a_s * (1 - alpha))
classic: beta for the posterior variance, in sampling | ddpm_step | variance == "posterior" | False
classic: variance where the standard deviation belongs, in sampling | ddpm_step | math.sqrt(sigma2) | sigma2
dpm++ of first order | _extrapolated | not before | True
dpm++sde adds too little noise | dpmpp_sde_step | math.sqrt((1 - a_s) * new) | math.sqrt((1 - a_t) * new)
the decoder's variance is the posterior's of t = 1 | bound_term | self.betas[0].item() |
  self.tables["variance_posterior"][1].item()
noisy timesteps drawn more often | * | alpha_bars ** 0.25 #1 | alpha_bars ** -0.25
[diffusion_model]
the network does not start at zero | UNet | nn.init.zeros_(self.out.weight) | None
the UNet does not see what the pixels show | BayesUNet.forward | shown #1 | 0 * shown
the variance of the noise without the scale | BayesUNet | (1 - alpha_bars) / alpha_bars | 1 - alpha_bars
Bayes' rule without the prior | BayesUNet.posterior | logits + log_p | log_p
blocks do not start as the identity | ResidualBlock | (self.conv2, self.scale_shift) | [self.scale_shift]
no label is the last class | UNet.forward | self.classes | self.classes - 1
skip connection taken before its block | UNet | skip = x = self.down(x, emb) | skip, x = x, self.down(x, emb)
middle blocks not told time and label | UNet.forward | block(x, emb) | block(x, torch.zeros_like(emb))
images depend on their batch | norm | nn.GroupNorm(1, channels, affine=False) | nn.BatchNorm2d(channels, affine=False)
GroupNorm with another eps | norm | nn.GroupNorm(1, channels, affine=False) | nn.GroupNorm(1, channels, 1e-3, False)
classic: labels dropped per batch, not per sample | drop_labels | labels.shape | 1
classic: guidance scale off by one | guided | guidance #3 | guidance + 1
classic: is 0 or 1 no guidance? | guided | model(x_t, t, None) #1 | model(x_t, t, labels)
[sample]
classic: last batch dropped | generate | range(share[0] * batch_size, n, share[1] * batch_size) | $[:n // batch_size]
classic: last partial batch filled up | generate | min(start + batch_size, n) | start + batch_size
every batch has the same noise | generate | ImageNoise(seed, indices) | ImageNoise(seed, range(len(indices)))
the first step adds the noise that it started from | generate | noise_fn #1 | ImageNoise(seed, indices)
classic: film saved without undoing the scaling | follow | to_uint8(x_t[:n]) | (x_t[:n] * 255).to(torch.uint8)
[train]
classic: EMA updated before the optimizer step | train | optimizer.step() && update_ema |
  None && lambda *given: ($(*given), [optimizer.step() for optimizer in optimizers])
classic: EMA forgets the buffers | update_ema | ours.copy_(theirs[name]) | None
EMA and network are one | train | copy.deepcopy(network) | network
classic: t = 0 never trained | draw_batch | p.cumsum(0) | $ * ($ > p[0])
classic: t = T-1 never trained | draw_batch | len(p) - 1 | len(p) - 2
classic: digits flipped, in training | draw_batch | to_float(x0) | $.flip(3)
classic: images left in [0, 1], in training | draw_batch | to_float | (lambda images: images / 255)
classic: last partial batch dropped | draw_batch | epoch, index = position // n, position % n |
  whole = max(1, n // batch_size) * batch_size; epoch, index = position // whole, position % whole % n
classic: last partial batch repeats the epoch it began in | draw_batch | epoch == e | epoch[:1] == e
classic: last partial batch dropped from the length | train | math.ceil #1 | math.floor
classic: data order restarted each epoch | draw_batch | shuffled(seed, e, n) | shuffled(seed, 0, n)
the same noise at each step | draw_batch | fold_in(seed, step, 1) | fold_in(seed, 1)
classic: sampling with the raw weights, in reports | train | ema #6 | model
labels forgotten in training | train | partial(model, labels=y) | model
learning rate follows --max-steps | train | step / total | step / last
[utils/checkpoint]
raw weights saved as the average | _state_of_a_run | ema.network.state_dict() | network.state_dict()
forgotten lock | run_folder | lock_folder(out) | contextlib.nullcontext(out.mkdir(parents=True, exist_ok=True))
classic: sampling with the raw weights | load_model | "ema" if ema else "model" | "model" if "model" in state else "ema"
classic: sampling in train mode | load_model | restore_network(path, settings, tensors, device).eval | $.__self__.train
classic: learning rate and data order restarted on resume | Progress | (step, seconds, lr, history, curve) | (0, *$[1:])
the optimizers start anew on resume | restore_run | restore_optimizers | lambda *_: None
EMA restarted from the raw weights on resume | restore_run | state["ema"] | state["model"]
memory for whatever network the file claims | check_weights | torch.device("meta") | torch.device("cpu")
a trial step changes the network itself | after_a_step | copy.deepcopy((network, optimizers)) | (network, optimizers)
[utils/files]
forgotten fsync | atomic_write | os.fsync(file.fileno()) | None
fsync before the last bytes have left Python | atomic_write | file.flush() | None
renamed before it is written | atomic_write | file.flush() | os.replace(temporary, path), $, os.link(path, temporary)
copied instead of renamed | atomic_write | os.replace(temporary, path) #1 | path.write_bytes(temporary.read_bytes())
a link replaced by a file | atomic_write | path = Path(path).resolve() | path = Path(path)
temporary file on another file system | _temporary | path.parent | Path(os.environ["TMPDIR"])
temporary file left after a failure | atomic_write | temporary.unlink(missing_ok=True) | None
leftovers of the living removed | remove_leftovers | _lock(file) | True
leftovers of other files removed | atomic_write | glob.escape(path.name) | "*"
a lock that several can have | _lock | fcntl.LOCK_EX | fcntl.LOCK_SH
lock lost before the end | lock_folder | yield | file.close(), (yield)
a name too many believed | _read_pickle | value in STORAGES | $ or value == "__builtin__ bytearray"
one value in many places | _read_pickle | type(memo[value]) in (str, Name) | True
[utils/data]
classic: images saved without undoing the scaling | finished | to_uint8(x) | (x * 255).to(torch.uint8)
classic: images left in [0, 1] | to_float | images.to(torch.float32) / 127.5 - 1 | images.to(torch.float32) / 255
classic: scaling not undone | to_uint8 | (x.float() + 1) * 127.5 | x.float() * 255
classic: digits flipped | _mnist | images #2 | images.flip(3)
classic: digits flipped, in EMNIST | _from_torchvision | images.transpose(1, 2) | $.flip(2)
[utils/pictures]
GIF durations in seconds | save_gif | 80 && 2000 | 0.08 && 2.0
grid filled column by column | make_grid | i // columns && i % columns | i % rows && i // rows
metrics.csv written in place | write_report | atomic_write(out / "metrics.csv") | open(out / "metrics.csv", "wb")
[utils/metrics]
validation noise new each time | Validation | torch.Generator().manual_seed(0) | None
Frechet: root of the product forgotten | frechet_distance | _root(cov_a) @ _root(cov_b) | cov_a @ cov_b
jackknife over what is left out, not what is kept | jackknife | ~g | g
classifier test scored on what it was trained on | two_sample_figures | x[half:] | x[:n - half]
three repetitions of one network | two_sample_figures | fold_in(seed, repeat) #2 | fold_in(seed, 0)
[utils/muon]
momentum not kept | Muon.step | "momentum" not in self.state[p] | True
Nesterov's look ahead forgotten | Muon.step | torch._foreach_lerp(gradients, momenta, mu) | momenta
one norm for all matrices | orthogonalize | (1, 2) | (0, 1, 2)
Muon for the layers at the ends too | make_optimizers | for_adamw.isdisjoint(name.split(".")) | True
[utils/settings]
class shares all alike | settings_of_the_data | labels.bincount(minlength=classes) / len(labels) | 0 * $ + 1 / classes
the learning rate may change on resume | resumed_settings | SETTINGS[name].may_change | $ or name == "lr"
the interval in alpha_bar | noise_level | math.sqrt((1 - alpha_bar) / alpha_bar) | alpha_bar
[utils/cli]
SIGTERM ends a step half done | StopSignals | ("SIGINT", "SIGTERM", "SIGHUP") | ("SIGINT", "SIGHUP")
a second Ctrl-C waits for the step | StopSignals | signal.signal(which, self.before[which]) | None
NaN is a number | number | low <= value <= high | $ or value != value
""".replace("\n  ", " ").strip().splitlines()

# module | function | how a mutant made by an operator begins, as --list shows it | why it is right that no test notices
REASONS = dict(line.rsplit(" | ", 1) for line in """
diffusion_schedules | check_betas | swap: last < LEAST -> last <= LEAST | no table ends at it to the last bit
ddpm | _log_decoder | swap: x0 > 1 - 1 / 255 -> x0 >= 1 - 1 / 255 | no grey level lies there
train | train | shift: 2 -> 3 | any number makes a stream of its own
utils/files | _read_pickle.fill | drop term: not isinstance(stack[-1], dict) or | it cannot be filled either
utils/files | _view | swap: er >= 0 for number in whole)) or len(size) | as torch
utils/files | _view | drop term: not all((type(number) is int | as torch
utils/files | _view | drop term: type(number) is int and number >= 0 -> type(number) is int | as torch
utils/files | _view | shift: 0 -> 1 | it is empty
utils/pictures | read_folder | drop sign: -2 -> 2 | the third of four is the last but one
utils/metrics | random_groups | drop term: f_class), dtype=torch.float64) + 0.5 -> | within one of the shares, too
evaluate | * | shift: 5 -> 6 | a point of a plot
evaluate | * | scale: 1.5 -> 1.65 | a point of a plot
utils/data | class_of | swap:  * (math.sqrt(5) - 1) / 2 % 1 * sum(shares) -> | they add up to 1
""".strip().splitlines())

SWAPS = {ast.Add: ast.Sub, ast.Mult: ast.Div, ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Eq: ast.NotEq, ast.Is: ast.IsNot,
         ast.In: ast.NotIn, ast.And: ast.Or}
SWAPS |= {b: a for a, b in SWAPS.items()} | {ast.FloorDiv: ast.Mult}
TWINS = {"min": "max", "any": "all", "argmin": "argmax", "amin": "amax", "sin": "cos", "floor": "ceil"}
TWINS |= {b: a for a, b in TWINS.items()}
# Calls that can be left out: x.f() and f(x) become x.
SHEDDABLE = set("abs ceil clamp clone copy cpu cumsum detach double eval exp expm1 flatten flip float half log log1p "
                "lower mean reversed round set softmax sorted sqrt square strip sum to unsqueeze view".split())
SYMMETRIC = {"min", "max", "minimum", "maximum", "zip", "integer", "number"}  # or nearly so
# Left alone, as cosmetic or dangerous: arguments of these names, calls of these objects, functions of these names. The
# tests run as whoever you are: no mutant, nor one by hand, may weaken what keeps atomic_write from replacing a device
# such as /dev/null, or send a signal to another process.
QUIET = set("chunk desc description disable dynamic_ncols errors flush fused help indent leave memory_format metavar "
            "name smoothing unit unit_scale".split())
SILENT = {"bar", "print", "super", "tqdm", "warnings"}
SPARED = {"atomic_write", "check_target", "keep_memory", "plot_losses", "plot_sweep", "train_classifier"}


def owner(node):
    """The name at the left end: `torch` of torch.cat(x).sum()."""
    while isinstance(node, (ast.Attribute, ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return getattr(node, "id", "")


def changes(node):
    """What the operators make of a node of the syntax tree: tuples (operator, the node to replace, its new text)."""
    text = ast.unparse

    def altered(**fields):
        return text(type(node)(**{**dict(ast.iter_fields(node)), **fields}))

    match node:
        case ast.BinOp(left=a, op=op, right=b):
            if any(isinstance(x, ast.JoinedStr) or isinstance(getattr(x, "value", None), str) for x in (a, b)):
                return  # a message or a path
            if type(op) in SWAPS and not isinstance(a, ast.List) and not isinstance(b, ast.List):
                yield "swap", node, altered(op=SWAPS[type(op)]())
            if isinstance(op, (ast.Add, ast.Sub, ast.Mult, ast.Div)):
                yield "drop term", node, text(a)
            if isinstance(op, (ast.Add, ast.Sub, ast.Mult)):
                yield "drop term", node, f"-({text(b)})" if isinstance(op, ast.Sub) else text(b)
        case ast.BoolOp(op=op, values=values):
            yield "swap", node, altered(op=SWAPS[type(op)]())
            for i in range(len(values)):
                yield "drop term", node, altered(values=values[:i] + values[i + 1:])
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                yield "swap", node, altered(ops=[*ops[:i], SWAPS[type(op)](), *ops[i + 1:]])
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield "drop sign", node, text(operand)
        case ast.Constant(value=bool(value)):
            yield "flip", node, str(not value)
        case ast.Constant(value=int(value)) if value <= 1000:
            yield "shift", node, str(value + 1)
        case ast.Constant(value=float(value)) if 1e-4 < value < 1e6:  # others stand for almost 0, or for infinity
            yield "scale", node, repr(round(value * 1.1, 12))
        case ast.If(test=test, body=[*_, ast.Raise() | ast.Return() | ast.Continue()]):
            yield "drop guard", test, "False"
        case ast.If(test=test) | ast.IfExp(test=test):
            yield "negate", test, f"not ({text(test)})"
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            yield "drop statement", node, "pass"
        case ast.Call(func=f, args=args, keywords=keywords):
            name = text(f).rpartition(".")[2]
            if name in TWINS:
                yield "swap", f, text(f).removesuffix(name) + TWINS[name]
            for i, keyword in enumerate(keywords):
                if keyword.arg and keyword.arg not in QUIET:
                    yield "drop keyword", node, altered(keywords=keywords[:i] + keywords[i + 1:])
            if len(args) > 1 and type(args[0]) is type(args[1]) is not ast.Starred and name not in SYMMETRIC:
                yield "swap arguments", node, altered(args=[args[1], args[0], *args[2:]])
            if name in SHEDDABLE and text(f) != name and text(f.value) not in ("F", "math", "np", "torch"):
                yield "drop call", node, text(f.value)
            elif name in SHEDDABLE and args:
                yield "drop call", node, text(args[0])


def candidates(tree, function=""):
    """All that the operators make of a syntax tree: tuples (function, operator, node, new text), in a fixed order."""
    for field, value in ast.iter_fields(tree):
        for node in value if isinstance(value, list) else [value]:
            if (not isinstance(node, ast.AST) or field in ("annotation", "returns", "decorator_list")
                    or isinstance(node, (ast.JoinedStr, ast.Raise, ast.Import, ast.ImportFrom, ast.arg))
                    or getattr(node, "arg", "") in QUIET or owner(getattr(node, "value", node)) in SILENT
                    or isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
                    or field in ("defaults", "kw_defaults") and type(getattr(node, "value", None)) is int
                    or getattr(node, "name", "") in SPARED):
                continue
            inside = function
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                inside = f"{function}.{node.name}".lstrip(".")
            elif not isinstance(tree, ast.While) or field != "test":  # such a loop would never end
                yield from ((inside, *change) for change in changes(node))
            yield from candidates(node, inside)


def by_operators(module, tree):
    """The candidates whose hash is below the module's share, as rows of BY_HAND, but with a node for `old`."""
    seen = collections.Counter()
    for function, operator, node, new in candidates(tree):
        old = ast.unparse(node)
        key = f"{module} {function} {operator} {old} {new}"
        seen[key] += 1
        if new != old and int(hashlib.md5(f"{key} {seen[key]}".encode()).hexdigest(), 16) < MODULES[module][0] * 2**128:
            # What differs, with a little of what is around it.
            start = len(os.path.commonprefix([old, new]))
            end = len(os.path.commonprefix([old[start:][::-1], new[start:][::-1]]))
            a, z = max(0, start - 30), max(0, end - 15)
            bug = f"{operator}: {old[a:len(old) - z]} -> {new[a:len(new) - z]}".replace("\n", " ")
            row = f"{module} | {function or '*'} | {bug}"
            yield bug, function or "*", node, new, "".join(REASONS[start] for start in REASONS if row.startswith(start))


class Mutant(collections.namedtuple("Mutant", "number module function bug reason lines source error")):
    """One change of one module: its number among all, the numbers of the lines that change, the whole source with the
    bug in it, and, if it cannot be made, why."""

    def __str__(self):
        return f"{self.number:4} {self.module}:{min(self.lines, default=0)} {self.function}: {self.bug}"


def find(tree, function, anchor):
    """The one node in a function that is the expression or statement `anchor`. Raises ValueError unless there is one,
    or there are several and the anchor says which."""
    for name in function.split(".") if function != "*" else ():
        tree = next((node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))
                     and node.name == name), ast.Pass())
    anchor, _, ordinal = anchor.partition(" #")
    wanted = ast.parse(anchor).body[0]
    wanted = ast.dump(wanted.value if isinstance(wanted, ast.Expr) else wanted)
    places = sorted((node.lineno, node.col_offset, node) for node in ast.walk(tree) if ast.dump(node) == wanted)
    if not 1 <= int(ordinal or len(places) == 1) <= len(places):
        raise ValueError(f"{len(places)} places in {function} for {anchor}")
    return places[int(ordinal or 1) - 1][2]


def splice(source, node, new):
    """The source with a node of its tree replaced by other text ($: its own). No other line gets another number."""
    own, text = ast.unparse(node), source.encode()  # the columns of nodes count bytes
    starts = [0, *itertools.accumulate(map(len, text.splitlines(keepends=True)))]
    before, after = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
    expression, padding = isinstance(node, ast.expr), "\n" * (node.end_lineno - node.lineno)
    new = f"({new.replace('$', f'({own})')}{padding})" if expression else new.replace("$", own) + padding
    return (text[:before] + new.encode() + text[after:]).decode()


def mutants():
    """All of them, numbered from 1: module by module, those made by hand first."""
    by_hand, numbers = collections.defaultdict(list), itertools.count(1)
    for line in BY_HAND:
        if line.startswith("["):
            module = line.strip("[]")
        else:
            bug, function, old, new, *reason = line.split(" | ")
            by_hand[module].append((bug, function, old, new, *(reason or [""])))
    for module in MODULES:
        source = (ROOT / f"{module}.py").read_text()
        tree = ast.parse(source)
        for bug, function, old, new, reason in [*by_hand[module], *by_operators(module, tree)]:
            lines, mutated = [], source
            try:
                nodes = [find(tree, function, part) for part in old.split(" && ")] if isinstance(old, str) else [old]
                for node, part in sorted(zip(nodes, new.split(" && ")), reverse=True,
                                         key=lambda pair: (pair[0].lineno, pair[0].col_offset)):
                    lines += range(node.lineno, node.end_lineno + 1)
                    mutated = splice(mutated, node, part)
                error = "changes nothing" if ast.dump(ast.parse(mutated)) == ast.dump(tree) else ""
            except (ValueError, SyntaxError) as problem:
                error = str(problem)
            yield Mutant(next(numbers), module, function, bug, reason, lines, mutated, error)


class Plugin:
    """For pytest in a copy: puts the tests with the lowest ranks first (`only` some, unless it is empty), and notes, in
    a file of JSON lines, what became of them and, if `traced`, which lines they pass through (in its main thread)."""

    def __init__(self, notes, ranks, traced, only):
        self.notes, self.ranks, self.traced, self.only = notes, ranks, traced, only
        self.modules = {str(Path(f"{module}.py").resolve()): module for module in MODULES}

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if not self.only or item.nodeid in self.only]
        files = list(dict.fromkeys(item.path for item in items))
        items.sort(key=lambda item: (files.index(item.path), self.ranks.get(item.nodeid, 0)))

    def pytest_runtest_logstart(self, nodeid):
        self.lines = set()  # (module, number)
        if self.traced:
            sys.settrace(self.trace)

    def trace(self, frame, event, argument):
        if module := self.modules.get(frame.f_code.co_filename):  # nothing else is traced line by line
            self.lines.add((module, frame.f_lineno))
            return self.trace

    def pytest_runtest_logreport(self, report):
        note = {"test": report.nodeid, "failed": report.failed, "seconds": report.duration, "lines": [*self.lines]}
        print(json.dumps(note), file=self.notes, flush=True)


def run_pytest(copy, beside, ranks, traced, only, files):
    """In a process of its own: runs pytest on test files, from the folder `copy`. What it says goes to the folder
    `beside`, as do the plugin's notes."""
    import resource

    import pytest

    os.setsid()  # so that what a test started can be ended with it
    output = os.open(beside / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1), os.dup2(output, 2)
    os.chdir(copy)
    (beside / "temporary").mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(beside / "temporary")
    _, hard = resource.getrlimit(resource.RLIMIT_AS)  # a mutant that asks for all of the memory does not get it
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30 if hard == resource.RLIM_INFINITY else hard, hard))
    with open(beside / "notes", "w") as notes:
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={beside}/pytest", *files],
                           plugins=[Plugin(notes, ranks, traced, only)])
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def kill(process):
    """Ends a process of run_pytest and what its tests have started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


class Workshop:
    """A sound copy of the repository in a folder, copies with mutants beside it, and what is known of the tests."""

    def __init__(self, folder):
        self.folder, self.sound = Path(folder), Path(folder) / "sound"
        # A server imports once what takes seconds, and forks. It has one thread, as a fork would not have the others.
        os.environ["OMP_NUM_THREADS"] = "1"
        sys.path[:] = [entry for entry in sys.path if not Path(entry).resolve().is_relative_to(ROOT)]  # copies have own
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([
            "pytest", "torch", "torchvision.datasets", "matplotlib.figure", "imageio.v3", "PIL.Image", "tqdm",
            "torch._subclasses.fake_tensor", "scipy.stats", "scipy.linalg", "diffusers.schedulers"])
        self.seconds = collections.Counter()  # of each test that passed in the sound copy
        self.passers = collections.defaultdict(set)  # (module, line) -> the tests that pass through it there
        self.limits = {}  # seconds that a test file may take in a mutant, known once it passed in the sound copy
        self.killers = collections.deque(maxlen=8)  # the tests that killed the last mutants, and may kill the next
        listing = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                                 check=True, capture_output=True, text=True).stdout
        for name in filter(lambda name: (ROOT / name).is_file(), listing.split("\0")):
            (self.sound / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self.sound / name)
        known = {".".join(path.relative_to(self.sound).with_suffix("").parts).removeprefix("tests."): path
                 for path in self.sound.rglob("*.py")}
        self.imported = {name: imported(name, known) for name in known if name.startswith("test_")}

    def tests_of(self, module):
        """Two lists of test files: where the module's mutants are most likely noticed, and all others that import it,
        those that take less time first."""
        first = [name for name in MODULES[module][1].split() if name in self.imported]
        rest = [name for name in self.imported if module.replace("/", ".") in self.imported[name] and name not in first]
        rest.sort(key=lambda name: (self.limits.get(name, 0), name))
        return (first, rest) if first else (rest, [])

    def control(self, name):
        """Runs a test file in the sound copy and learns how long it takes. Raises RuntimeError if it fails."""
        start = time.monotonic()
        code, notes, output = self.run(self.sound, [name], limit=1800, traced=True)
        if code != 0:
            raise RuntimeError(f"{name} fails without any mutation, exit code {code}:\n{output[-3000:]}")
        for note in notes:
            self.seconds[note["test"]] += note["seconds"]
            for module, line in note["lines"]:
                self.passers[module, line].add(note["test"])
        self.limits[name] = 60 + 4 * (time.monotonic() - start)

    def judge(self, mutant):
        """Makes a mutant and runs the tests that might notice. Returns (mutant, what became of it, seconds), where the
        second is "killed by ...", "time-out", "SURVIVED", or an "ERROR" of the suite, which has noticed nothing."""
        start, copy = time.monotonic(), self.folder / f"mutant-{mutant.number}"
        shutil.copytree(self.sound, copy)
        path = copy / f"{mutant.module}.py"
        # What was compiled from the original would be taken for the mutant if both had the same size and second.
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
            compiled.unlink()
        path.write_text(mutant.source)
        first, rest = self.tests_of(mutant.module)
        passers = set().union(*(self.passers[mutant.module, line] for line in mutant.lines))
        if passers:  # else it is a line that runs on import, which any test may depend on
            rest = [name for name in rest if any(f"/{name}.py::" in test for test in passers)]
        for names in [first[:1]] if mutant.reason else filter(None, [first, rest]):
            code, notes, output = self.run(copy, names, sum(self.limits[name] for name in names), passers,
                                           only=passers if names is rest else ())
            failed = [note["test"] for note in notes if note["failed"]]
            self.killers += failed
            what = ("SURVIVED" if code == 0 else "time-out" if code is None else f"killed by {failed[0]}" if failed
                    else f"ERROR, exit code {code}:\n{output[-3000:]}" if code in (1, 3, 4, 5) or not notes
                    else f"killed by the end of pytest, exit code {code}")  # by a signal, or Ctrl-C that came through
            if code != 0:
                break
        shutil.rmtree(copy, ignore_errors=True)
        return mutant, what, time.monotonic() - start

    def run(self, copy, names, limit, passers=(), traced=False, only=()):
        """Runs pytest on test files in a copy, the `passers` among their tests first: exit code (None: it took longer
        than `limit` seconds), what the plugin noted, and what pytest said."""
        beside = Path(tempfile.mkdtemp(prefix="run-", dir=self.folder))
        # The quickest first; before them, unless they take long, those that killed the last mutants.
        ranks = {test: s for test, s in self.seconds.items() if Path(test.split("::")[0]).stem in names}
        ranks |= {test: -place for place, test in enumerate(self.killers, 1) if ranks.get(test, 3) < 3}
        ranks |= {test: ranks[test] - 1e6 for test in ranks.keys() & passers}
        process = self.context.Process(target=run_pytest, args=(
            copy, beside, ranks, traced, only, [f"tests/{name}.py" for name in names]))
        process.start()
        process.join(limit)
        code = process.exitcode
        kill(process)
        if not Path(os.devnull).is_char_device():
            raise RuntimeError(f"{os.devnull} is no device any more, and no verdict is worth anything: put it back")
        notes, output = ((beside / name).read_text(errors="replace") for name in ("notes", "output"))
        shutil.rmtree(beside, ignore_errors=True)
        return code, list(map(json.loads, notes.splitlines())), output


def imported(name, known):
    """The names of all modules in `known` (name -> path) that one of them imports, directly or not, with its own."""
    found, waiting = set(), [name]
    while waiting:
        name = waiting.pop()
        if name in known and name not in found:
            found.add(name)
            for node in ast.walk(ast.parse(known[name].read_text())):
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    module = getattr(node, "module", "")
                    waiting += [module, *(f"{module}.{alias.name}".lstrip(".") for alias in node.names)]
    return found


def ranges(text):
    """An argparse type: "3,10-12" -> {3, 10, 11, 12}."""
    return {n for part in text.split(",") for n in range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1)}


def print_summary(verdicts, seconds):
    """Per module how many were noticed, and which were not. Returns the share that was, of all."""
    noticed = {mutant.number for mutant, what, _ in verdicts if what.startswith(("killed", "time-out"))}
    print(f"\n{'module':<22}mutants  noticed")
    for module in dict.fromkeys(mutant.module for mutant, *_ in sorted(verdicts)):
        rows = [verdict for verdict in sorted(verdicts) if verdict[0].module == module]
        print(f"{module:<22}{len(rows):7}{sum(mutant.number in noticed for mutant, *_ in rows):9}")
        for mutant, what, _ in rows:
            if mutant.number not in noticed:
                print(f"    {mutant}: {what}", mutant.reason)
    print(f"{'all':<22}{len(verdicts):7}{len(noticed):9}  {len(noticed) / len(verdicts):.1%} in {seconds / 60:.1f} min")
    return len(noticed) / len(verdicts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", choices=MODULES, help="mutants of this module only")
    parser.add_argument("--only", type=ranges, metavar="N,N-N", help="mutants with these numbers only")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="how many at a time; default: 2")
    parser.add_argument("--list", action="store_true", help="run nothing: print them, and whether all still apply")
    flags = parser.parse_args()

    chosen = [mutant for mutant in mutants() if flags.module in (None, mutant.module)
              and (flags.only is None or mutant.number in flags.only)]
    broken = [f"{mutant}: {mutant.error}" for mutant in chosen if mutant.error]
    if broken or not chosen:
        print("these mutants do not apply; mend their rows:" if broken else "no such mutant", *broken, sep="\n",
              file=sys.stderr)
        return 2
    if flags.list:
        return print(*chosen, f"all {len(chosen)} mutants apply", sep="\n")

    start = time.monotonic()
    sys.warnoptions.append("ignore:resource_tracker")  # which, at the end, speaks of what killed tests left behind
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with (tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as folder,
          concurrent.futures.ThreadPoolExecutor(flags.jobs) as pool):
        try:
            shop, verdicts = Workshop(folder), []
            needed = {name for mutant in chosen for names in shop.tests_of(mutant.module) for name in names}
            list(pool.map(shop.control, sorted(needed)))
            print(f"unmutated, all {len(shop.seconds)} tests pass, in {time.monotonic() - start:.0f} s", flush=True)
            for future in concurrent.futures.as_completed(
                    [pool.submit(shop.judge, mutant) for mutant in chosen]):
                verdicts.append(future.result())
                print("{}: {} in {:.0f} s".format(*verdicts[-1]), flush=True)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 2
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                kill(process)
    return 0 if print_summary(verdicts, time.monotonic() - start) >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())

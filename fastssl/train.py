"""Pretraining: fastssl pretrain DATA [flags], or torchrun --nproc_per_node 8 -m fastssl.train DATA [flags].

file -> loader -> augment -> encoders q, k -> losses -> optimizer -> checkpoint -> eval, in that order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastssl import distributed, same_on_ranks
from fastssl.augment.normalise import normalise_bytes
from fastssl.augment.policy import Policy
from fastssl.augment.views import make_views
from fastssl.batch import ImageBatch, split_batch
from fastssl.build import (
    Trainee,
    check_parts,
    compile_and_wrap,
    make_deterministic,
    make_trainee,
    open_loader,
    open_policy,
)
from fastssl.command import PREEMPTED, run_command
from fastssl.config import Config
from fastssl.describe_run import describe
from fastssl.distributed import Ranks, gather_rows, mean_over_ranks
from fastssl.eval.online import make_probe
from fastssl.flags import parse_or_launch
from fastssl.health import Health, check_weights
from fastssl.input_stream import IN_TURN, InputStream
from fastssl.key_shuffle import in_rank_order, shuffle_rows, unshuffle_keys
from fastssl.loaders.make import Loader
from fastssl.losses import check_loss_inputs, moco_loss
from fastssl.machine.precision import compute_dtype
from fastssl.optim import set_lr
from fastssl.plan import Plan, directions, make_plan
from fastssl.random_key import STREAM_SHUFFLE, STREAM_STEP, derive_seed, permutation
from fastssl.resume import start_or_resume, state_of
from fastssl.run import Run
from fastssl.run_folder import choose_folder
from fastssl.stop_signal import StopSignal

TrainStep = Callable[[ImageBatch, int], dict[str, Tensor]]


def make_train_step(
    config: Config,
    plan: Plan,
    trainee: Trainee,
    policy: Policy,
    ranks: Ranks,
    health: Health,
    inputs: InputStream = IN_TURN,
) -> TrainStep:
    """The only definition of a training step: returns the function `train_step(batch, step) -> metrics`.

    The order is the paper's: EMA, keys, losses against the old queue, optimiser, enqueue. `batch`: this rank's share of
    step `step` (from 0), drawn by `inputs`. metrics: 0-dim tensors on the device. Only the first call syncs
    (each with --debug, or with --sync-bn among several ranks).
    """
    moco, encoder_q, optimizer, scaler = trainee[:4]
    seed, accumulate = config.train.seed, config.optim.accumulate
    size, views_by = config.augment.image_size, config.augment.augment_kernel
    ways = directions(config)
    dtype = compute_dtype(config.train.precision, ranks.device)
    # The shuffle changes nothing if batch norm's statistics cover the whole global batch.
    shuffles = not config.model.sync_bn and ranks.world_size * config.model.bn_splits > 1
    # Views travel between ranks as bytes, unless they are queries too or hide-and-seek has set parts of them to zero.
    key_bytes = shuffles and ranks.world_size > 1 and ways == 1 and not policy.hide_and_seek
    unchecked = True

    def autocast() -> torch.autocast:
        return torch.autocast(ranks.device.type, dtype=dtype, enabled=dtype != torch.float32)

    @torch.no_grad()
    def encode_keys(view_k: Tensor, micro_step: int) -> Tensor:
        """The keys of all ranks, (W * B, D) unit rows in rank order, for the B views of each rank."""
        if shuffles:
            order = permutation(seed, micro_step, ranks.world_size * view_k.shape[0], STREAM_SHUFFLE)
            view_k = shuffle_rows(view_k, order, ranks)
        with autocast():
            z = moco.encoder_k(normalise_bytes(view_k, dtype, views_by) if key_bytes else view_k)
        k = normalize(z.float(), dim=1)
        return unshuffle_keys(k, order, ranks) if shuffles else gather_rows(k, ranks)

    def train_step(batch: ImageBatch, step: int) -> dict[str, Tensor]:
        nonlocal unchecked
        if trainee.compiled == "graphs":
            torch.compiler.cudagraph_mark_step_begin()  # the results of earlier replays may be overwritten
        torch.manual_seed(derive_seed(seed, step, STREAM_STEP, ranks.rank))  # for dropout
        set_lr(optimizer, plan.learning_rate(step))
        moco.update_key_encoder(plan.ema_momentum(step))
        keys, losses = [], []
        for micro, part in enumerate(split_batch(batch, accumulate)):
            views = inputs.run(make_views, part, policy, size, seed, plan.epoch(step), dtype, views_by, key_bytes)
            if ways == 2:
                views = torch.cat(views), torch.cat(views[::-1])
            view_q, view_k = (view.contiguous(memory_format=moco.memory_format) for view in views)
            all_keys = encode_keys(view_k, step * accumulate + micro)
            if ranks.world_size > 1:
                encoder_q.require_backward_grad_sync = micro + 1 == accumulate
            with autocast():
                z = encoder_q(view_q)
            moco.count_batch()
            q, k = normalize(z.float(), dim=1), all_keys.chunk(ranks.world_size)[ranks.rank]  # (B, D) each
            if unchecked or config.train.debug:
                check_loss_inputs(q, k, moco.queue)  # waits for the device
                unchecked = False
            pairs = zip(q.chunk(ways), k.chunk(ways))
            found = [moco_loss(*pair, moco.queue, config.loss, config.train.loss_kernel) for pair in pairs]
            scaler.scale(sum(loss.total for loss in found) / (ways * accumulate)).backward()
            keys.append(all_keys)
            losses += [loss.by_name() for loss in found]
        metrics = {name: torch.stack([loss[name] for loss in losses]).mean() for name in losses[0]}
        if len(q) > ways:
            metrics["feature_std"] = q.detach().std(dim=0, correction=0).norm()  # 1: spread out; 0: collapsed
        if config.optim.clip_grad is not None:
            scaler.unscale_(optimizer)
            metrics["grad_norm"] = nn.utils.clip_grad_norm_(moco.encoder_q.parameters(), config.optim.clip_grad)
        health.update(step, metrics)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        moco.update_queue(in_rank_order(keys, ranks.world_size))
        return metrics

    return train_step


def pretrain(config: Config, again: str = "--resume auto") -> int:
    """A whole run. Returns 0 when it is complete, PREEMPTED when a signal stopped it; `again` is how to continue it."""
    check_parts(config)
    make_deterministic(config.train.deterministic)
    ranks = distributed.start(config.train.device)
    try:
        same_on_ranks.check_options(config, ranks)
        folder, config = choose_folder(config, ranks)
        with closing(open_loader(config, ranks)) as loader:
            return train(config, loader, folder, ranks, again)
    finally:
        distributed.stop()


def train(config: Config, loader: Loader, folder: Path, ranks: Ranks, again: str) -> int:
    """Builds the parts, resumes, and runs the loop over the remaining steps."""
    t, stop = config.train, StopSignal(ranks)
    plan = make_plan(config, loader.batches_per_epoch)
    policy = open_policy(config)
    trainee = make_trainee(config, ranks)
    first, notes = start_or_resume(config, plan, trainee, folder, loader.num_images, ranks)
    trainee = compile_and_wrap(config, trainee, ranks)
    encoder, health = trainee.moco.encoder_q, Health(ranks, plan.queue_filled())
    inputs = InputStream(ranks.device)
    train_step = make_train_step(config, plan, trainee, policy, ranks, health, inputs)
    probe, note = make_probe(config, loader, ranks)

    with stop.on_signals(), closing(Run(folder, config, plan, first, ranks)) as run:
        run.say(*describe(config, plan, loader, trainee, ranks), note, *notes)
        run.preview(loader, policy)
        if probe and run.owes_probe(first):
            run.probe(first, probe, encoder.backbone)
        for step, batch in zip(range(first, plan.stop), inputs.draw(loader.batches(first))):
            metrics = train_step(batch, step)
            done, last, asked = step + 1, step + 1 == plan.stop, stop()
            run.advance()
            if done % t.log_every == 0 or last:
                run.say(*health.check(encoder))
                run.log(done, {**mean_over_ranks(metrics, ranks), "lr": plan.learning_rate(step)})
                run.say_bad_images(loader.bad_images)
                run.say(*(inputs.news() if t.log_every > 1 else []))  # a log line itself makes the GPU idle
            asks = probe and plan.probes_after(done)
            if asked or last or asks or plan.saves_after(done):  # first: a probe may outlast a signal's patience
                with run.clock.paused():
                    run.say(*health.check(encoder))
                    check_weights(encoder, ranks, done)
                    run.save(done, state_of(trainee, done, config, loader.num_images, ranks.world_size))
            if asked and not last:
                run.say(f"stopped by a signal, saved after step {done}; continue with {again} --output {folder}")
                return PREEMPTED
            if asks:
                run.probe(done, probe, encoder.backbone)
    return 0


def main(argv: Sequence[str]) -> int:
    """`fastssl pretrain`."""
    return pretrain(parse_or_launch(argv))


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

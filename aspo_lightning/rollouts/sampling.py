"""Prompts -> completions -> rewards, in turns where an environment answers. Every rank samples its share."""

import hashlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, Unpack

from torch import distributed as dist
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from aspo_lightning.collectives import gather
from aspo_lightning.engines.base import Engine, SamplingRequest, generate
from aspo_lightning.errors import RESUME, RunError
from aspo_lightning.evaluation.metrics import repetition_rate
from aspo_lightning.rewards import Call, Judgement, Result, RewardItem, RewardPool
from aspo_lightning.rollouts.settings import Sampling
from aspo_lightning.types import CompletionRecord, Known, Prompt, Rollout, RolloutGroup


def sampling_seed(seed: int, epoch: int, prompt_id: str, sample: int, turn: int = 0) -> int:
    """f(run seed, epoch, prompt, sample): siblings differ, and a resumed run draws the same again. 0 to 2^63 - 1."""
    key = f"{seed}/{epoch}/{prompt_id}/{sample}" + (f"/{turn}" if turn else "")
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1


class SamplingStopped(RunError):
    """``Sampler.stop`` was called."""

    def __init__(self) -> None:
        super().__init__(f"What was being sampled ahead was given up. {RESUME}.")


class Journal(Protocol):
    """Keeps what is done, so that a sampling that was killed resumes where it stopped."""

    def get(self, prompt_id: str, sample: int) -> Known:
        """What is known of a completion."""
        ...

    def add(self, prompt_id: str, sample: int, **known: Unpack[Known]) -> None:
        """Keeps what has become known of it."""
        ...


@dataclass
class _Episode:
    """A completion in the making."""

    prompt: Prompt
    sample: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)
    truncated: bool = False
    failed: bool = False
    ended: bool = False
    known: Known = field(default_factory=Known)
    """By the journal."""
    judgement: Judgement | None = None
    answer: "Future[Result] | None" = None

    def record(self) -> CompletionRecord:
        """For the journal."""
        record = CompletionRecord(ids=self.ids, truncated=self.truncated, failed=self.failed)
        if self.prompt.environment:
            record["turns"], record["sampled"] = self.turns, self.sampled
        return record

    def restore(self, record: CompletionRecord, tokenizer: PreTrainedTokenizerBase) -> None:
        self.ids, self.truncated, self.failed = record["ids"], record["truncated"], record["failed"]
        self.turns = record["turns"] if "turns" in record else [_turn(tokenizer, self.prompt.prompt_ids, self.ids)]
        self.sampled = record.get("sampled", [True] * len(self.ids))
        self.logprobs = [0.0] * len(self.ids)
        self.ended = True


class _Job(NamedTuple):
    """What ``Sampler.groups`` was asked for."""

    sampling: Sampling
    epoch: int
    description: str | None
    vote: bool
    journal: Journal | None
    judges: bool
    """Whether this rank has its completions scored and kept."""

    @property
    def no_bars(self) -> bool | None:
        """Of tqdm: None leaves bars out where there is no terminal."""
        return None if self.description else True


class Sampler:
    """Samples groups and has them scored; each rank its share, the result gathered on all of them.

    Where several ranks share an engine, they all sample its share, and the first of them has it scored.

    Args:
        engine: what samples.
        pool: the processes that score.
        tokenizer: of the model.
        rank: of this process.
        world_size: processes.
        process_group: of the ranks, for a sampler that works beside what they do in the usual one.
        repetition_ngram: words of the n-grams that are counted for the repetition rate.
    """

    def __init__(
        self,
        engine: Engine,
        pool: RewardPool,
        tokenizer: PreTrainedTokenizerBase,
        *,
        rank: int = 0,
        world_size: int = 1,
        process_group: dist.ProcessGroup | None = None,
        repetition_ngram: int = 20,
    ) -> None:
        self.engine, self.pool, self.tokenizer, self.rank, self.world_size = engine, pool, tokenizer, rank, world_size
        self.process_group, self.repetition_ngram = process_group, repetition_ngram
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Ends a sampling under way in another thread, at its next completion, with SamplingStopped."""
        self._stopped.set()

    def groups(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        epoch: int,
        description: str | None = "generate",
        vote: bool = False,
        journal: Journal | None = None,
    ) -> tuple[list[RolloutGroup], dict[str, float]]:
        """A group for each prompt.

        Args:
            prompts: any number.
            sampling: how.
            epoch: of the seeds.
            description: of the progress bar; None: there is no bar.
            vote: also asks what each completion answers, by the ``answer`` of its first reward.
            journal: what it knows isn't done again, and what is done is added to it. Its rollouts have no log-probs.

        Returns:
            The groups in the order of the prompts, and the seconds of generation and reward (of the slowest rank).
        """
        size = self.engine.tensor_parallel_size
        share = prompts[self.rank // size :: self.world_size // size]
        job = _Job(sampling, epoch, description, vote, journal, judges=self.rank % size == 0)
        start = time.perf_counter()
        episodes = [_Episode(prompt, sample) for prompt in share for sample in range(sampling.group_size)]
        try:
            for episode in episodes if journal else ():
                self._restore(episode, job)
            turn = 0
            while active := [e for e in episodes if not e.ended]:
                self._sample_turn(active, job, turn)
                self._reply([e for e in active if not e.ended], job)
                turn += 1
            generated = time.perf_counter()
            if not job.judges:
                episodes, share = [], []
            bar = tqdm(episodes, desc="reward", leave=False, disable=job.no_bars)
            rollouts = [self._rollout(episode, job) for episode in bar]
        except BaseException:
            self.pool.close()  # nobody waits for what was submitted
            raise
        groups = [
            RolloutGroup(prompt, tuple(rollouts[i * sampling.group_size : (i + 1) * sampling.group_size]))
            for i, prompt in enumerate(share)
        ]
        times = {"time/generate_s": generated - start, "time/reward_s": time.perf_counter() - generated}
        everywhere = gather((groups, times), self.process_group)
        shares = [groups for groups, _ in everywhere[::size]]
        groups = [shares[i % len(shares)][i // len(shares)] for i in range(len(prompts))]
        return groups, {key: max(times[key] for _, times in everywhere) for key in times}

    def _restore(self, episode: _Episode, job: _Job) -> None:
        """What the journal knows of the episode."""
        assert job.journal
        episode.known = job.journal.get(episode.prompt.id, episode.sample)
        if completion := episode.known.get("completion"):
            episode.restore(completion, self.tokenizer)
            self._judge(episode, job)

    def _sample_turn(self, episodes: Sequence[_Episode], job: _Job, turn: int) -> None:
        """Adds a turn of the model to each episode; ends those that nothing can follow."""
        sampling = job.sampling
        requests = [
            SamplingRequest(
                (*e.prompt.prompt_ids, *e.ids),
                sampling.max_tokens - len(e.ids),
                sampling_seed(sampling.seed, job.epoch, e.prompt.id, e.sample, turn),
                sampling.temperature,
                sampling.top_p,
            )
            for e in episodes
        ]

        with tqdm(total=len(requests), desc=job.description, leave=False, disable=job.no_bars) as bar:
            for index, completion in generate(self.engine, requests):
                if self._stopped.is_set():
                    raise SamplingStopped()
                episode = episodes[index]
                episode.ids += completion.completion_ids
                episode.logprobs += completion.generator_logprobs
                episode.sampled += [True] * len(completion.completion_ids)
                episode.turns.append(_turn(self.tokenizer, requests[index].prompt_ids, completion.completion_ids))
                episode.truncated = completion.truncated
                if completion.truncated or episode.prompt.environment is None:
                    self._end(episode, job)
                bar.update()

    def _reply(self, episodes: Sequence[_Episode], job: _Job) -> None:
        """Adds the environment's reply to each episode, or ends it."""
        calls = [
            self.pool.submit(Call(e.prompt.environment, list(e.turns), e.prompt.row))
            for e in episodes
            if e.prompt.environment
        ]
        bar = tqdm(episodes, desc="environment", leave=False, disable=job.no_bars)
        for episode, call in zip(bar, calls, strict=True):
            result = call.result()
            reply = result.value
            if not isinstance(reply, str):
                episode.failed = result.failed or reply is not None
                self._end(episode, job)
                continue
            text = episode.prompt.before_reply + reply + episode.prompt.after_reply
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
            if len(episode.ids) + len(ids) >= job.sampling.max_tokens:  # no room for another turn
                episode.truncated = True
                self._end(episode, job)
                continue
            episode.ids += ids
            episode.logprobs += [0.0] * len(ids)
            episode.sampled += [False] * len(ids)

    def _end(self, episode: _Episode, job: _Job) -> None:
        """Nothing follows; the episode is judged while others are still sampled."""
        episode.ended = True
        if job.journal and job.judges:
            job.journal.add(episode.prompt.id, episode.sample, completion=episode.record())
        self._judge(episode, job)

    def _judge(self, episode: _Episode, job: _Job) -> None:
        """What is judged is the last turn: an environment's replies may hold answers."""
        if not job.judges or "solved" in episode.known:
            return
        prompt, turn = episode.prompt, episode.turns[-1]
        episode.judgement = self.pool.judge(RewardItem(prompt.rewards, turn, prompt.row))
        if job.vote:
            episode.answer = self.pool.submit(Call(f"{next(iter(prompt.rewards))}:answer", turn, prompt.row))

    def _rollout(self, episode: _Episode, job: _Job) -> Rollout:
        """The episode with its rewards, once they are there."""
        known = episode.known
        if episode.judgement:
            reward, solved, failed = (0.0, False, True) if episode.failed else episode.judgement.result()
            answer = episode.answer.result().value if episode.answer else None
            known = Known(reward=reward, solved=solved, failed=failed, answer=None if answer is None else str(answer))
            if job.journal:
                job.journal.add(episode.prompt.id, episode.sample, **known)
        text = _decode(self.tokenizer, episode.ids)
        return Rollout(
            completion_ids=tuple(episode.ids),
            generator_logprobs=tuple(episode.logprobs),
            truncated=episode.truncated,
            text=text,
            reward=known["reward"],
            solved=known["solved"],
            failed=known["failed"],
            sampled=None if all(episode.sampled) else tuple(episode.sampled),
            answer=known["answer"],
            repetition_rate=repetition_rate(text, self.repetition_ngram),  # here, where each rank has its share
            rewards=episode.judgement.values() if episode.judgement else {},
            turns=len(episode.turns),
        )


def _turn(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]) -> str:
    """A turn's text as it is judged: where the chat template opens the thinking (R1-Distill), that is part of it."""
    opened = _decode(tokenizer, before[-16:]).rstrip().endswith("<think>")  # the last tokens, white space included
    return ("<think>" if opened else "") + _decode(tokenizer, ids)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))

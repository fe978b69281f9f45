"""What a run logs, by TensorBoard tag, and what each tag means. docs/tags.md has ``table``."""

from aspo_lightning.markdown import markdown_table

TAGS = {
    "rollout/reward": "mean task reward of all completions, before shaping",
    "rollout/accuracy": "share of completions that are full solutions",
    "rollout/length": "mean number of tokens that the model sampled in a completion",
    "rollout/length_right": "the same over full solutions",
    "rollout/length_wrong": "the same over all other completions",
    "rollout/truncated_fraction": "share of completions that ran into the length limit",
    "rollout/repetition_rate": "mean share of a completion's n-grams of words that repeat (`data.repetition_ngram`)",
    "rollout/repetition_rate_right": "the same over full solutions",
    "rollout/repetition_rate_wrong": "the same over all other completions",
    "rollout/failed_rewards": "number of completions whose reward hung, crashed or raised; they score 0",
    "rollout/kept_groups": "number of groups that are trained on",
    "rollout/level": "level that prompts are drawn from (curriculum `RisingLevels`)",
    "rollout/lag": "epochs between the weights that sampled the phase and those that it trains (`data.lag`)",
    "policy/loss": "mean loss of the micro-batches",
    "policy/entropy": "mean entropy of the policy at the response tokens, in nats",
    "policy/kl": "mean KL estimate to the reference at the response tokens, in nats (`kl_coef` above 0)",
    "policy/grad_norm": "mean norm of the optimizer steps' gradients, before clipping",
    "policy/skipped_steps": "number of optimizer steps that were skipped: their loss or gradient wasn't finite",
    "policy/clip_fraction_positive": "share of the tokens with positive advantage that left the trust region",
    "policy/clip_fraction_negative": "the same for negative advantage",
    "policy/dual_clip_fraction_positive": "share of the tokens with positive advantage limited by `dual_clip`",
    "policy/dual_clip_fraction_negative": "the same for negative advantage",
    "policy/ratio_positive": "mean ratio of policy to old policy at the tokens with positive advantage",
    "policy/ratio_negative": "the same for negative advantage",
    "policy/effective_sample_size": "effective sample size of r = π/π_old, as a share: (Σr)² / (N Σr²)",
    "mismatch/logprob_abs_mean": "mean absolute difference of the trainer's and the engine's log-probs",
    "mismatch/logprob_abs_max": "its maximum",
    "mismatch/kl": "mean KL estimate of the engine to the trainer's old policy at the response tokens, in nats",
    "mismatch/effective_sample_size": "effective sample size of r = π_old/π_engine, likewise",
    "mismatch/cut_fraction": "share of the tokens whose weight a bound of `data.mismatch` changed",
    "mismatch/corrected_sample_size": "effective sample size of the weights that `data.mismatch` gives",
    "time/sync_s": "seconds until the engine has the new weights",
    "time/generate_s": "seconds of sampling, with the rewards that are done meanwhile",
    "time/wait_s": "seconds of waiting for what is sampled beside the training (`data.lag`)",
    "time/reward_s": "seconds of waiting for rewards after that",
    "time/score_s": "seconds of old and reference log-probs",
    "time/update_s": "seconds of the optimizer steps",
    "throughput/generate_tokens_s": "tokens that the model sampled, a second and rank",
    "throughput/score_tokens_s": "tokens of the micro-batches over the seconds of scoring, a rank",
    "throughput/update_tokens_s": "the same over those of the optimizer steps",
    "throughput/update_peak_share": "the update's products with weights, over what one large product reaches here",
}
"""Of each epoch. Averages over tokens are missing for an epoch in which no group was trained on."""

CLOCKED = ("time/", "throughput/")
"""How the tags begin that tell how fast it went: in no two runs the same."""

EVALUATION = {
    "avg@<k>": "share of the k completions of each problem that solve it",
    "pass@<k>": "chance that one of k completions solves a problem",
    "maj@<k>": "chance that the answer given most often by k completions is right",
    "length": "mean number of tokens that the model sampled in a completion",
    "truncated_fraction": "share of completions that ran into the length limit",
    "repetition_rate": "mean share of a completion's n-grams of words that repeat (`data.repetition_ngram`)",
    "failed_rewards": "share of completions whose reward hung, crashed or raised",
}
"""Of each benchmark that is evaluated, as ``eval/<benchmark>/...``."""


FINAL = {"final/<tag>": "the last value of reward, accuracy, entropy and avg@k, beside the settings in TensorBoard"}


def table() -> str:
    """Markdown: a row for each tag."""
    rows = {**TAGS, **FINAL, **{f"eval/<benchmark>/{name}": meaning for name, meaning in EVALUATION.items()}}
    return markdown_table(["tag", "meaning"], ([f"`{tag}`", meaning] for tag, meaning in rows.items()))

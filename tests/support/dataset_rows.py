"""Hand-written rows in the real schema of each dataset that a shipped config trains on."""

import json

ADD = "a, b = map(int, input().split())\nprint(a + b)"


def verl_row(question, ground_truth, index):
    return {
        "data_source": "train-math",
        "prompt": [{"role": "user", "content": question}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": {"index": index},
    }


def dapo_row(question, answer, index):
    frame = "Solve the following math problem step by step. The last line of your response should be of the form "
    frame += "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    frame += 'Remember to put your answer on its own line after "Answer:".'
    row = verl_row(frame.format(question), answer, index)
    return {"prompt": question, "solution": answer, "source_prompt": row.pop("prompt"), **row}


ROWS = {
    "deepscaler": [
        {"problem": r"What is $\frac{1}{2}+\frac{1}{4}$?", "answer": r"\frac{3}{4}", "solution": "Add."},
        {"problem": "How many primes are below 10?", "answer": "4", "solution": ""},
    ],
    "skywork_or1_math": [
        {**verl_row("Solve x^2 = 4 for x > 0.", '["2"]', 0), "model_difficulty": {"DeepSeek-R1-Distill-Qwen-7B": 3}},
        verl_row("Give an interval.", r'["(0, \\frac{1}{2}]"]', 1),
    ],
    "dapo_math": [dapo_row("What is 6*7?", "42", "a"), dapo_row("What is 2^5?", "32", "b")],
    "code_contests": [
        {
            "name": "1_A. Sum",
            "description": "Print the sum of two numbers.",
            "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
            "private_tests": {"input": [], "output": []},
            "generated_tests": {"input": ["5 6\n", "0 0\n"], "output": ["11\n", "0\n"]},
            "source": 2,
            "difficulty": 7,
            "solutions": {"language": [3], "solution": [ADD]},
            "time_limit": {"seconds": 2, "nanos": 0},
        }
    ],
    "codeforces": [
        {
            "id": "1/A",
            "title": "Sum",
            "description": "Print the sum.",
            "input_format": "Two numbers.",
            "output_format": "Their sum.",
            "interaction_format": None,
            "note": None,
            "examples": [{"input": "1 2", "output": "3"}],
            "official_tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "4 5\n", "output": "9\n"}],
            "official_tests_complete": True,
            "time_limit": 2.0,
            "generated_checker": None,
        }
    ],
    "gpqa": [
        {
            "Question": "Which particle has no charge?",
            "Correct Answer": "neutron",
            "Incorrect Answer 1": "proton",
            "Incorrect Answer 2": "electron",
            "Incorrect Answer 3": "positron",
            "Subdomain": "Physics",
        }
    ],
    "deepcoder": {
        "primeintellect": [
            {
                "problem": "Print the sum of two numbers.",
                "solutions": [ADD],
                "tests": json.dumps([{"type": "stdin_stdout", "input": "1 2\n", "output": "3\n"}]),
            }
        ],
        "taco": [
            {
                "problem": "Print the sum of two numbers (taco).",
                "solutions": [ADD],
                "tests": json.dumps({"inputs": ["1 2\n", "4 5\n"], "outputs": ["3\n", "9\n"]}),
            }
        ],
        "lcbv5": [
            {
                "problem": "Return the sum of two numbers.",
                "starter_code": "class Solution:\n    def add(self, a: int, b: int) -> int:",
                "tests": json.dumps(
                    [{"input": "1\n2", "output": "3", "testtype": "functional", "metadata": {"func_name": "add"}}]
                ),
            }
        ],
        "codeforces": [
            {
                "problem": "Print the sum of two numbers (codeforces).",
                "tests": json.dumps([{"input": "1 2\n", "output": "3\n"}]),
            }
        ],
    },
}

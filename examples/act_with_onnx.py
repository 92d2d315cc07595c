"""Plays an episode with an exported policy: ONNX Runtime, NumPy and Gymnasium, without dt_ray or torch.

python examples/act_with_onnx.py policy.onnx -130
"""

import json
import sys

import gymnasium as gym
import numpy as np
import onnxruntime


def main(file: str, target_return: float, *, seed: int = 0) -> float:
    """The return that is reached."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    env, context, done, step = gym.make(facts["env_id"]), int(facts["context_length"]), False, 0
    discount = float(facts.get("discount", 1))  # of the returns-to-go that the policy was trained with
    lowest, highest = json.loads(facts.get("returns_to_go_bounds", "[[-Infinity], [Infinity]]"))

    def bounded(return_to_go: float) -> float:
        at = min(step, len(lowest) - 1)  # later steps have the bounds of the last one
        return min(max(return_to_go, lowest[at]), highest[at])

    observations, actions, missing, earned = (
        [env.reset(seed=seed)[0]],
        [np.zeros(env.action_space.shape or ())],
        [bounded(target_return)],
        0.0,
    )
    while not done:
        inputs = {
            "observations": np.array([observations[-context:]], np.float32),
            "previous_actions": np.array([actions[-context:]], np.float32),
            "returns_to_go": np.array([missing[-context:]], np.float32),
            "timesteps": np.arange(step + 1)[-context:][None],
        }
        wanted = {each.name: inputs[each.name] for each in session.get_inputs()}  # of IQL: the observation alone
        action = np.asarray(session.run(None, wanted)[0])[0]
        observation, reward, terminated, truncated, _ = env.step(action)
        observations.append(observation)
        actions.append(action)
        done, step, earned = terminated or truncated, step + 1, earned + float(reward)
        missing.append(bounded((missing[-1] - float(reward)) / discount))
    return earned


if __name__ == "__main__":
    print(f"return {main(sys.argv[1], float(sys.argv[2])):.1f}")

"""How many examples hypothesis draws for the blocks: few, and always the same; with `--hypothesis-profile=slow` many, and never the same."""

from hypothesis import HealthCheck, Phase, settings

# Machines are busy at times, and what is slow there is not wrong.
settings.register_profile("default", settings.get_profile("default"), deadline=None)
settings.load_profile("default")
settings.register_profile("slow", max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def few(count: int) -> settings:
    """So many, unless the profile is slow. One that fails is shown as it is: to make it smaller would take minutes, since every shape is compiled."""
    if settings.get_current_profile_name() == "slow":
        return settings()
    phases = (Phase.explicit, Phase.generate)
    return settings(
        max_examples=count, deadline=None, derandomize=True, phases=phases, suppress_health_check=[HealthCheck.too_slow]
    )

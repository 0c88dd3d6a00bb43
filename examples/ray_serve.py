"""Replicas that come and go with the load, on Ray Serve: pip install 'flagai_altdiff[web,ray]', then

    serve run examples.ray_serve:app

Any replica may answer a request of OpenAI's or A1111's interface, as its images are in the answer. Jobs that are
watched need the server that has them; docs/server.md says how a load balancer finds it.
"""

import os

from ray import serve
from starlette.types import ASGIApp


def replica() -> ASGIApp:
    """One replica: a server without a page, whose processes draw on what Ray has given it."""
    from flagai_altdiff.web.app import managed_app
    from flagai_altdiff.web.settings import Access, Drawing, Settings

    models = tuple(os.environ.get("ALTDIFF_MODELS", "AltDiffusion-mini").split(","))
    # Ray's proxy is the door that strangers come to; it is asked for under its own name.
    return managed_app(Settings(page=False, drawing=Drawing(models=models, folder=None), access=Access(hosts=("*",))))


deployment = serve.deployment(
    name="altdiff",
    ray_actor_options={"num_cpus": 1},  # {"num_gpus": 1} for the large models
    max_ongoing_requests=16,  # the replica draws like ones together
    autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 8},
    health_check_period_s=2,
)(serve.ingress(replica)(type("AltDiffusion", (), {})))
app = deployment.bind()

"""The gateway on AWS Lambda behind API Gateway: `cxr_portal.aws_lambda.handler`.

Its settings are the environment variables of `cxr portal run`. There are no jobs, for nothing runs
between two requests. API keys need a database that all instances share.
"""

import asyncio
from dataclasses import replace

from mangum import Mangum

from cxr.logs import LogFormat, configure
from cxr_portal.app import create_app
from cxr_portal.cli import environment_settings

configure(LogFormat.JSON)
_app = create_app(replace(environment_settings(), job_workers=0, allowed_hosts=()))
# Once for the life of the instance; Mangum would start and end the application at each request.
_loop = asyncio.new_event_loop()
asyncio.set_event_loop(_loop)
_life = _app.router.lifespan_context(_app)
_loop.run_until_complete(_life.__aenter__())

handler = Mangum(
    _app, lifespan="off", text_mime_types=["application/json", "application/problem+json", "text/"]
)

"""What operators did, one record a call, whether it was allowed or not. Knows no call by its meaning.

The records go to the logger `kvservice.audit`, so that they can be kept apart from others. They hold what was asked
for: operators' requests name tenants, sessions, workers and limits, and hold no text of users.
"""

from __future__ import annotations

import logging

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from kvservice.gateway.auth import Caller

logger = logging.getLogger("kvservice.audit")


def audit(method: str, caller: Caller | None, peer: str, code: str, request: object) -> None:
    """Writes a call down. `caller` None: nobody that is known."""
    logger.info(
        "operator_call",
        extra={
            "method": method,
            "by_tenant": caller.tenant if caller is not None else "",
            "by_role": caller.role.value if caller is not None else "",
            "by_key": caller.key_id if caller is not None else "",
            "peer": peer,
            "code": code,
            "request": MessageToDict(request, preserving_proto_field_name=True) if isinstance(request, Message) else {},
        },
    )

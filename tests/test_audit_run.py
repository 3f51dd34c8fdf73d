"""An audit's runs from request to report, over real engines without Ray."""

import asyncio

from serve_app.audits import AuditStatus

from .audit_rig import AuditRig


async def test_a_run_paints_every_cell_and_writes_its_report() -> None:
    rig = AuditRig()
    audit = await rig.run()
    assert audit.status == AuditStatus.SUCCEEDED, audit.error
    assert audit.result_count == 4
    cells = await rig.cells()
    assert sorted(cells) == ["a_gs2", "a_gs4", "b_gs2", "b_gs4"]
    print(cells["a_gs2"].model_dump_json(indent=1))
    print(await rig.paths(), audit)

//! `kprov` with the provider `azure`, against the ARM server, whose machines are machines of this host.

use anyhow::{Context as _, Result, ensure};
use kprov_e2e::cloud::{Azure, scenario};
use kprov_e2e::{Cluster, Traces, full, payloads, upgrades};
use kprov_emulators::azure::{Arm, Fault, Options, Refusal, What};
use serde_json::{Value, json};

/// Made, used, mended, upgraded without one call to Azure, and removed without a trace: three control-plane machines and three
/// workers in three zones with `--full`; else one and one, and `up` and `down` are killed on their way. No public addresses.
#[test]
fn machines_live() -> Result<()> {
    for chain in upgrades()? {
        let before = Traces::list();
        {
            let range = "10.82.0.0/16".parse()?;
            let azure = Azure::start("room-azure", range, true)?;
            let (size, kills): (_, &[u64]) = if full() { ((3, 3), &[]) } else { ((1, 1), &[5, 40]) };
            scenario::life(&azure, "e2e-azure", range, &chain[..2], size, kills)?;
        }
        Traces::nothing_left(&before)?;
    }
    Ok(())
}

/// `kprov up` and `kprov down` killed at their calls to Azure; with public addresses.
#[test]
#[ignore = "takes long: `cargo xtask test --full` runs it"]
fn killed_at_calls() -> Result<()> {
    let before = Traces::list();
    {
        let range = "10.81.0.0/16".parse()?;
        let azure = Azure::start("room-azure-kill", range, false)?;
        let payload = upgrades()?.into_iter().next().context("no chain")?.remove(0);
        scenario::killed(&azure, "e2e-azure-kill", range, &payload, if full() { 1 } else { 15 })?;
    }
    Traces::nothing_left(&before)
}

/// What Azure refuses is said with what to do about it and exit code 1; `down` then leaves nothing.
#[test]
fn refusals_are_said() -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let arm = runtime.block_on(Arm::start(Options::default()))?;
    let variables = arm.identity_variables().map(|(name, value)| (name.to_owned(), value));
    let cluster = Cluster::with_environment("e2e-azure-no", variables.to_vec())?;
    let payload = payloads()?.remove(0);
    let temp = tempfile::tempdir()?;
    let file = temp.path().join("cluster.yaml");
    let refused = |edit: &dyn Fn(&mut Value), says: &[&str]| -> Result<()> {
        let mut text = json!({
            "apiVersion": "kprov.io/v1alpha1", "kind": "Cluster", "metadata": {"name": cluster.name},
            "spec": {
                "provider": "azure", "workers": {"count": 1},
                "azure": {"subscription": arm.subscription(), "location": "westeurope", "endpointUrl": arm.endpoint()},
                "kubernetes": {"releaseUrls": ["http://192.0.2.1"]},
            },
        });
        edit(&mut text["spec"]);
        std::fs::write(&file, text.to_string())?;
        let mut up = cluster.kprov(&["up", "--no-progress", "-f", &file.to_string_lossy()]);
        let out = up.args(payload.options()).output()?;
        let text = String::from_utf8_lossy(&out.stderr);
        ensure!(out.status.code() == Some(1), "{:?}\n{text}", out.status);
        for part in says.iter().chain(&["hint:"]) {
            ensure!(text.contains(part), "`{part}` is not in:\n{text}");
        }
        arm.clear_faults();
        arm.permit_all();
        arm.unrestrict();
        Ok(())
    };
    let as_it_is = |_: &mut Value| {};

    arm.fault(Fault::on("*", What::ExpiredToken).always());
    refused(&as_it_is, &["the Azure access token has expired", "az login"])?;
    arm.fault(Fault::on("*", What::WrongTenant).always());
    refused(
        &as_it_is,
        &["of another tenant than the subscription", "AZURE_TENANT_ID"],
    )?;
    let other = |spec: &mut Value| spec["azure"]["subscription"] = "00000000-0000-4000-8000-000000000000".into();
    refused(&other, &["the subscription is not there", "spec.azure.subscription"])?;
    let nowhere = |spec: &mut Value| spec["azure"]["location"] = "atlantis".into();
    refused(&nowhere, &["there is no such location", "az account list-locations"])?;
    arm.deny("Microsoft.Network/natGateways/write", "/");
    refused(
        &as_it_is,
        &[
            "`Microsoft.Network/natGateways/write` over `/subscriptions/",
            "az role assignment create",
        ],
    )?;
    let unknown = |spec: &mut Value| spec["workers"]["size"] = "Standard_Imaginary".into();
    refused(
        &unknown,
        &[
            "there is no size `Standard_Imaginary` in `westeurope`",
            "az vm list-skus",
        ],
    )?;
    arm.restrict_size("Standard_D2s_v5", None);
    refused(
        &as_it_is,
        &["size `Standard_D2s_v5` can't be had in `westeurope`", "another size"],
    )?;
    arm.set_quota("standardDSv5Family", 1);
    refused(
        &as_it_is,
        &["the quota `standardDSv5Family` is used up", "Usage + quotas"],
    )?;
    arm.set_quota("standardDSv5Family", 100);
    let full = Refusal::new(409, "ZonalAllocationFailed", "We do not have sufficient capacity.");
    arm.fault(Fault::on("PUT virtualMachines", What::Fail(full)).always());
    refused(
        &as_it_is,
        &[
            "has no room for a machine",
            "We do not have sufficient capacity",
            "another size",
        ],
    )?;

    let down = cluster.kprov(&["down", "--name", &cluster.name, "--yes"]).output()?;
    let said = String::from_utf8_lossy(&down.stdout).into_owned();
    ensure!(down.status.success() && said.contains("nothing left"), "{down:?}");
    ensure!(arm.resources().is_empty(), "{:?}", arm.resources());
    Ok(())
}

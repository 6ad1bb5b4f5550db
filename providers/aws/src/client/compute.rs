//! Calls about instances, volumes and images.

use std::collections::{BTreeMap, BTreeSet};

use aws_sdk_ec2::types as ec2;
use kprov_types::ClusterName;

use super::{Called, Client, PAGE, filter, list, of};
use crate::error::failed;
use crate::model::{Image, Instance, InstanceKind, Volume};
use crate::translate::{self, MACHINE};

impl Client {
    /// The cluster's instances, those included that ended during the last hour.
    pub(crate) async fn instances(&self, cluster: &ClusterName) -> Called<Vec<Instance>> {
        let pages = self.ec2.describe_instances().filters(of(cluster)).max_results(PAGE);
        let reservations: Vec<_> = pages
            .into_paginator()
            .items()
            .send()
            .collect::<Result<Vec<ec2::Reservation>, _>>()
            .await
            .map_err(failed("DescribeInstances", "list instances"))?;
        let instances = reservations.iter().flat_map(ec2::Reservation::instances);
        Ok(instances.filter_map(translate::instance).collect())
    }

    pub(crate) async fn start(&self, instances: &[String]) -> Called<()> {
        let what = failed("StartInstances", format!("start {}", list(instances)));
        let call = self.ec2.start_instances().set_instance_ids(Some(instances.to_vec()));
        call.send().await.map(drop).map_err(what)
    }

    pub(crate) async fn terminate(&self, instances: &[String]) -> Called<()> {
        let what = failed("TerminateInstances", format!("remove {}", list(instances)));
        let call = self
            .ec2
            .terminate_instances()
            .set_instance_ids(Some(instances.to_vec()));
        call.send().await.map(drop).map_err(what)
    }

    /// Lets an instance be terminated.
    pub(crate) async fn unprotect(&self, instance: &str) -> Called<()> {
        let what = failed("ModifyInstanceAttribute", format!("end the protection of `{instance}`"));
        let off = ec2::AttributeBooleanValue::builder().value(false).build();
        let call = self.ec2.modify_instance_attribute().instance_id(instance);
        call.disable_api_termination(off).send().await.map(drop).map_err(what)
    }

    pub(crate) async fn console(&self, instance: &str) -> Called<Option<String>> {
        let call = self.ec2.get_console_output().instance_id(instance);
        let reply = call
            .send()
            .await
            .map_err(failed("GetConsoleOutput", format!("read the console of `{instance}`")))?;
        Ok(reply.output)
    }

    /// The cluster's data volumes.
    pub(crate) async fn volumes(&self, cluster: &ClusterName) -> Called<Vec<Volume>> {
        let data = ec2::Filter::builder().name("tag-key").values(MACHINE).build();
        let pages = self
            .ec2
            .describe_volumes()
            .filters(of(cluster))
            .filters(data)
            .max_results(PAGE);
        let volumes: Vec<_> = pages
            .into_paginator()
            .items()
            .send()
            .collect::<Result<_, _>>()
            .await
            .map_err(failed("DescribeVolumes", "list volumes"))?;
        Ok(volumes.iter().filter_map(translate::volume).collect())
    }

    /// Whether a volume is there.
    pub(crate) async fn volume_exists(&self, volume: &str) -> Called<bool> {
        let call = self.ec2.describe_volumes().volume_ids(volume);
        let going = [ec2::VolumeState::Deleting, ec2::VolumeState::Deleted];
        match call
            .send()
            .await
            .map_err(failed("DescribeVolumes", format!("look at the volume `{volume}`")))
        {
            Ok(reply) => Ok(reply
                .volumes()
                .iter()
                .any(|v| v.state().is_none_or(|s| !going.contains(s)))),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub(crate) async fn attach_volume(&self, volume: &str, instance: &str) -> Called<()> {
        let what = failed("AttachVolume", format!("attach the volume `{volume}` to `{instance}`"));
        let call = self.ec2.attach_volume().volume_id(volume).instance_id(instance);
        call.device(translate::DEVICE).send().await.map(drop).map_err(what)
    }

    pub(crate) async fn delete_volume(&self, volume: &str) -> Called<()> {
        let what = failed("DeleteVolume", format!("remove the volume `{volume}`"));
        self.ec2
            .delete_volume()
            .volume_id(volume)
            .send()
            .await
            .map(drop)
            .map_err(what)
    }

    /// What instances of these sizes need.
    pub(crate) async fn kinds(&self, sizes: &BTreeSet<&str>) -> Called<BTreeMap<String, InstanceKind>> {
        let names: Vec<&str> = sizes.iter().copied().collect();
        let what = failed(
            "DescribeInstanceTypes",
            format!("use instances of type `{}`", names.join("`, `")),
        );
        let types = names.iter().map(|n| ec2::InstanceType::from(*n)).collect();
        let call = self.ec2.describe_instance_types().set_instance_types(Some(types));
        let kinds: Vec<_> = call
            .into_paginator()
            .items()
            .send()
            .collect::<Result<_, _>>()
            .await
            .map_err(what)?;
        Ok(kinds.iter().filter_map(translate::kind).collect())
    }

    /// The newest image of an owner with a name like this one.
    pub(crate) async fn image_by_name(&self, owner: &str, name: &str, architecture: &str) -> Called<Option<Image>> {
        let what = failed("DescribeImages", format!("find an image `{name}`"));
        let call = self
            .ec2
            .describe_images()
            .owners(owner)
            .filters(filter("name", name))
            .filters(filter("architecture", architecture))
            .filters(filter("state", "available"));
        let reply = call.send().await.map_err(what)?;
        let newest = reply.images().iter().max_by_key(|i| i.creation_date());
        Ok(newest.and_then(translate::image))
    }

    pub(crate) async fn image_by_id(&self, image: &str) -> Called<Option<Image>> {
        let what = failed("DescribeImages", format!("use the image `{image}`"));
        let reply = self.ec2.describe_images().image_ids(image).send().await.map_err(what)?;
        Ok(reply.images().first().and_then(translate::image))
    }
}

//! CRI messages inside JSON records: the protobuf encoding as hex.
//!
//! Protobuf keeps its own rules of forward and backward compatibility, so a record written
//! by another version of the server decodes as long as the CRI messages do.

use std::ops::Deref;

use prost::Message;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::ids;

/// A protobuf message that serde writes as the hex of its encoding.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Wire<M>(pub(crate) M);

impl<M> Deref for Wire<M> {
    type Target = M;

    fn deref(&self) -> &M {
        &self.0
    }
}

impl<M: Message> Serialize for Wire<M> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&ids::hex(&self.0.encode_to_vec()))
    }
}

impl<'de, M: Message + Default> Deserialize<'de> for Wire<M> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = ids::unhex(&text).ok_or_else(|| D::Error::custom("not hex"))?;
        M::decode(bytes.as_slice()).map(Self).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pinion_cri_proto::v1::PodSandboxMetadata;

    #[test]
    fn a_message_survives_json() {
        let metadata = PodSandboxMetadata { name: "a".into(), attempt: 3, ..Default::default() };
        let text = serde_json::to_string(&Wire(metadata.clone())).unwrap();
        assert_eq!(serde_json::from_str::<Wire<PodSandboxMetadata>>(&text).unwrap().0, metadata);
        assert!(serde_json::from_str::<Wire<PodSandboxMetadata>>("\"xyz\"").is_err());
    }
}

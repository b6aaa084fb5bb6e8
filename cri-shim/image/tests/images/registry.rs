//! Debian's docker-registry on a loopback port, filled over HTTP.

use std::{
    fs,
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use pinion_image::Digest;
use reqwest::{Client, header::CONTENT_TYPE};

use crate::content::Image;

/// bcrypt of `secret`.
const HTPASSWD: &str = "user:$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";

/// A running registry, stopped on drop.
pub(crate) struct Registry {
    process: Child,
    dir: tempfile::TempDir,
    pub(crate) host: String,
    client: Client,
    password: Option<&'static str>,
}

impl Registry {
    pub(crate) async fn start() -> Self {
        Self::start_with(None).await
    }

    /// A registry that wants the user `user` with the password `secret`.
    pub(crate) async fn with_password() -> Self {
        Self::start_with(Some("secret")).await
    }

    async fn start_with(password: Option<&'static str>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let host = format!("127.0.0.1:{port}");
        let htpasswd = dir.path().join("htpasswd");
        fs::write(&htpasswd, HTPASSWD).unwrap();
        let mut config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\n\
             http: {{addr: \"{host}\"}}\n",
            dir.path().join("data").display()
        );
        if password.is_some() {
            let path = htpasswd.display();
            config.push_str(&format!("auth: {{htpasswd: {{realm: test, path: {path}}}}}\n"));
        }
        let file = dir.path().join("config.yml");
        fs::write(&file, config).unwrap();
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry is installed");
        let registry = Self { process, dir, host, client: client(), password };
        registry.wait().await;
        registry
    }

    async fn wait(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        let url = format!("http://{}/v2/", self.host);
        while self.client.get(&url).send().await.is_err() {
            assert!(Instant::now() < deadline, "docker-registry does not answer");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn request(&self, method: reqwest::Method, url: &str) -> reqwest::RequestBuilder {
        let request = self.client.request(method, url);
        match self.password {
            Some(password) => request.basic_auth("user", Some(password)),
            None => request,
        }
    }

    pub(crate) async fn push_blob(&self, repository: &str, blob: &[u8]) {
        let url = format!("http://{}/v2/{repository}/blobs/uploads/", self.host);
        let started = self.request(reqwest::Method::POST, &url).send().await.unwrap();
        assert_eq!(started.status(), 202);
        let location = started.headers()["location"].to_str().unwrap().to_owned();
        let mut upload = reqwest::Url::parse(&location).unwrap();
        upload.query_pairs_mut().append_pair("digest", Digest::of(blob).as_str());
        let put = self.request(reqwest::Method::PUT, upload.as_str()).body(blob.to_vec());
        assert_eq!(put.send().await.unwrap().status(), 201);
    }

    pub(crate) async fn push_manifest(&self, name: &str, media_type: &str, manifest: &[u8]) {
        let (repository, tag) = name.rsplit_once(':').unwrap();
        let url = format!("http://{}/v2/{repository}/manifests/{tag}", self.host);
        let put = self
            .request(reqwest::Method::PUT, &url)
            .header(CONTENT_TYPE, media_type)
            .body(manifest.to_vec());
        let answer = put.send().await.unwrap();
        assert_eq!(answer.status(), 201, "{}", answer.text().await.unwrap());
    }

    /// Pushes an image as `repository:tag` and returns the reference to pull it by.
    pub(crate) async fn push(&self, name: &str, image: &Image) -> String {
        let (repository, _) = name.rsplit_once(':').unwrap();
        for blob in image.blobs() {
            self.push_blob(repository, blob).await;
        }
        self.push_manifest(name, &image.manifest_type, &image.manifest).await;
        format!("{}/{name}", self.host)
    }

    /// Where the registry keeps a blob.
    pub(crate) fn blob_file(&self, digest: &Digest) -> PathBuf {
        let blobs = self.dir.path().join("data/docker/registry/v2/blobs/sha256");
        blobs.join(&digest.hex()[..2]).join(digest.hex()).join("data")
    }

    pub(crate) fn stop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A client for plain HTTP; building one wants a TLS provider all the same.
pub(crate) fn client() -> Client {
    let _ = rustls_graviola::default_provider().install_default();
    Client::builder().no_proxy().tls_certs_only([]).build().unwrap()
}

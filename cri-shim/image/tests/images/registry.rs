//! Debian's docker-registry on a loopback port, filled over HTTP.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
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
    scheme: &'static str,
    client: Client,
    password: Option<&'static str>,
}

impl Registry {
    pub(crate) async fn start() -> Self {
        Self::start_with(Security::None).await
    }

    /// A registry that wants the user `user` with the password `secret`.
    pub(crate) async fn with_password() -> Self {
        Self::start_with(Security::Password).await
    }

    /// A registry that speaks TLS with a certificate nobody knows, and that certificate.
    pub(crate) async fn with_tls() -> (Self, PathBuf) {
        let registry = Self::start_with(Security::Tls).await;
        let certificate = registry.dir.path().join("cert.pem");
        (registry, certificate)
    }

    async fn start_with(security: Security) -> Self {
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
        match security {
            Security::None => {}
            Security::Password => {
                let path = htpasswd.display();
                config.push_str(&format!("auth: {{htpasswd: {{realm: test, path: {path}}}}}\n"));
            }
            Security::Tls => {
                certify(dir.path());
                let dir = dir.path().display();
                let tls = format!("tls: {{certificate: {dir}/cert.pem, key: {dir}/key.pem}}");
                config = config.replace("http: {", &format!("http: {{{tls}, "));
            }
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
        let scheme = if security == Security::Tls { "https" } else { "http" };
        let password = (security == Security::Password).then_some("secret");
        let registry = Self { process, dir, host, scheme, client: client(), password };
        registry.wait().await;
        registry
    }

    async fn wait(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        let url = format!("{}://{}/v2/", self.scheme, self.host);
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
        let url = format!("{}://{}/v2/{repository}/blobs/uploads/", self.scheme, self.host);
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
        let url = format!("{}://{}/v2/{repository}/manifests/{tag}", self.scheme, self.host);
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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Security {
    None,
    Password,
    Tls,
}

/// Makes `cert.pem` and `key.pem` for 127.0.0.1.
fn certify(dir: &Path) {
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"])
        .args(["-nodes", "-days", "2", "-subj", "/CN=pinion-test", "-keyout", "key.pem"])
        .args(["-out", "cert.pem", "-addext", "subjectAltName=IP:127.0.0.1"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .current_dir(dir)
        .output()
        .expect("openssl is installed");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

/// A client that trusts anybody; building one wants a TLS provider even for plain HTTP.
pub(crate) fn client() -> Client {
    let _ = rustls_graviola::default_provider().install_default();
    Client::builder().no_proxy().tls_danger_accept_invalid_certs(true).build().unwrap()
}
